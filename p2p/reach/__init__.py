"""Being reachable behind NAT: AutoNAT, circuit relays, hole punching.

Imports `host` and `limits`.
"""
