"""The training step and its parts, and evaluation."""
