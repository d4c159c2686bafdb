"""seqio tasks and mixtures, one file a benchmark."""
