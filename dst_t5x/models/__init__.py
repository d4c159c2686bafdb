"""Networks, and how they decode."""
