"""Reads and writes checkpoints of pretrained models and of our own runs."""
