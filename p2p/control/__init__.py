"""The control plane: the protocol ``/tensorswarm/1``, its neighbours, and who may have what.

Imports `host`.
"""
