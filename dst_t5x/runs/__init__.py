"""Runs and their folders, from the plan to the result."""
