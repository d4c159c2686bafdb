"""Networks, their families, and decoding."""
