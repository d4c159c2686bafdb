"""Sweeps and launchers. No module here imports JAX at its top level."""

import dst_t5x  # noqa: F401 # Sets up what commands print.
