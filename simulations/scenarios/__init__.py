"""The scenarios: one small file each, found by name. See ``simulations/README.md``."""
