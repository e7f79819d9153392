"""How much and how fast: rates shared by neighbours, turns, and patience with the slow.

Imports nothing of the other rooms.
"""
