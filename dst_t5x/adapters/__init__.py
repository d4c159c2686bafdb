"""LoRA, (IA)³ and prompts: what a method adds to a network."""
