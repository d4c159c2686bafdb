"""seqio tasks and mixtures, one file a benchmark."""

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401
