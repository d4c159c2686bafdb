"""Formats of pretrained models and of runs, read and written."""
