"""What a run needs before it starts: memory, work, devices."""
