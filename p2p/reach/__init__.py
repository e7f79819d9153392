"""Being reachable behind NAT: AutoNAT and circuit relays.

Imports `host` and `limits`.
"""
