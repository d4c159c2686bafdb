"""From a seqio task to batches, and from texts to scores."""
