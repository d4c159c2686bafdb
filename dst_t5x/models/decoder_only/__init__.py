"""Decoder-only language models: Gemma, Llama, Qwen and those like them."""
