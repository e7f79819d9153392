"""The bulk plane: bytes from peer to peer, over TLS or libp2p streams, served and received.

Imports `swarm` (its contract), `host` and `limits`.
"""
