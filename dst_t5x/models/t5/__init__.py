"""The T5 1.1 family of encoder-decoder models."""
