"""Experiments that drive the real planner on a simulated network; see ``README.md``."""
