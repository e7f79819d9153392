"""The libp2p host: identity, addresses, connections and streams, and what py-libp2p gets wrong.

Imports nothing of the other rooms.
"""
