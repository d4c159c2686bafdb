"""Sweeps and launchers; imports no JAX."""
