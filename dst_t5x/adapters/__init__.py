"""Adapters, which a method adds to a network, such as LoRA and prompts."""
