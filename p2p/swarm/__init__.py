"""The planner: which chunk to ask of whom, and who is given up. No I/O, no clock.

Imports nothing of the other rooms; `source` is the contract with those that carry it out.
"""
