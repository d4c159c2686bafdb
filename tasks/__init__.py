"""seqio tasks and mixtures, one module for each benchmark."""

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401
