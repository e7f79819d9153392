"""Speed, measured beside the programs a user would otherwise pick.

Everything in one table comes from one run on one machine, contenders taking turns;
what counts are the ratios. Correctness is not tested here.
"""
