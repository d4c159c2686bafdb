"""Adapters, which a method adds to a network: LoRA, (IA)³ and prompts."""
