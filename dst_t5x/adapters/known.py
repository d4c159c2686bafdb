"""Imports all adapters, so that checkpoints can name them."""

from dst_t5x.adapters import dora  # noqa: F401
from dst_t5x.adapters import ia3  # noqa: F401
from dst_t5x.adapters import lora  # noqa: F401
from dst_t5x.adapters import pissa  # noqa: F401
from dst_t5x.adapters import prompts  # noqa: F401
from dst_t5x.adapters import vera  # noqa: F401
