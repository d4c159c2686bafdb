"""Sweeps and launchers; imports no JAX."""

import dst_t5x  # noqa: F401 # Sets up what commands print.
