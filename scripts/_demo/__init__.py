"""What `scripts/demo` runs: the story, its processes, and what it prints."""
