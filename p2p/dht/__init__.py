"""Discovery: the Kademlia DHT, announcing and finding, and the ways into the network.

Imports `control` and `host`.
"""
