"""Estimates of a run's memory, work and devices before it starts."""
