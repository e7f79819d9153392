"""HTTP origins: web servers that hold files of a model.

Imports `swarm` (its contract) and `limits`.
"""
