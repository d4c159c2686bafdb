"""Prompt tuning (Lester et al., 2021): trained vectors before the inputs.

The data puts placeholders before the inputs of every example: ids from the
vocabulary's size on. The network looks them up in the prompt instead of the
embedding, and, as Hugging Face, multiplies them by no scale of embeddings.
Each example of a packed row has its prompt directly before it. Attention,
positions and decoding need no changes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core import values
from dst_t5x.core.errors import UserError

_NAME = 'prompt'
# Rows are drawn from the most frequent pieces, which follow the special ones
# (Section 3.2: the 5,000 most common tokens).
_FIRST, _FREQUENT = 3, 5000


@dataclasses.dataclass(frozen=True)
class Prompt(adapters.Adapter):
  """A prompt [length, embed], beside the table of embeddings.

  Attributes:
    length: number of vectors.
    initialization: `vocabulary` takes the embeddings of random frequent pieces;
      `labels` takes those of the labels, and of random pieces for the rest;
      `uniform` draws from U(−0.5, 0.5).
    labels: texts of the task's answers, such as `entailment`.
  """

  length: values.Positive = 10
  initialization: Literal['vocabulary', 'labels', 'uniform'] = 'vocabulary'
  labels: Sequence[str] = ()

  added: ClassVar[str] = rf'(.*/)?{_NAME}'
  peft_type: ClassVar[str] = 'PROMPT_TUNING'

  def __post_init__(self) -> None:
    values.check_fields(self, 'PROMPT_')
    # Gin passes a list, which `jit` cannot hash.
    object.__setattr__(self, 'labels', tuple(self.labels))
    if (self.initialization == 'labels') != bool(self.labels):
      raise UserError(
        "PROMPT_LABELS goes with PROMPT_INITIALIZATION = 'labels', which needs"
        ' them'
      )

  def embed(
    self, embedding: adapters.Embedding, tokens: jax.Array
  ) -> jax.Array:
    """Looks up placeholders in the prompt, other ids in the embedding."""
    vocab_size = embedding.vocab_size
    pieces = embedding.apply(jnp.where(tokens < vocab_size, tokens, 0))
    prompt = embedding.parameter(
      _NAME,
      nn.initializers.uniform(1.0),
      (self.length, pieces.shape[-1]),
      # Small, so it is whole on all devices: no lookup is cheaper.
      ('prompt', None),
    )
    # Ids beyond both give NaN, the same as ids beyond an embedding.
    vectors = jnp.take(prompt, tokens - vocab_size, axis=0, mode='fill')
    is_prompt = (tokens >= vocab_size)[..., None]
    return jnp.where(is_prompt, vectors.astype(pieces.dtype), pieces)

  def prefix(self, vocab_size: int) -> tuple[int, ...]:
    """Returns the placeholders."""
    return tuple(range(vocab_size, vocab_size + self.length))

  def initialize(
    self,
    added: Mapping[str, np.ndarray],
    seed: Mapping[str, np.ndarray],
    random: np.random.Generator,
    encode: Callable[[str], list[int]],
    embedding_scale: float = 1.0,
  ) -> dict[str, np.ndarray]:
    """Returns the initial prompt; see `initialization`."""
    (path,) = added
    table = np.asarray(seed[path.removesuffix(_NAME) + 'embedding'])
    shape = self.length, table.shape[1]
    if self.initialization == 'uniform':
      prompt = random.uniform(-0.5, 0.5, shape)
    else:
      frequent = np.arange(_FIRST, min(_FREQUENT, len(table)))
      prompt = table[random.choice(frequent, self.length)]
      # A label of several pieces is the mean of their vectors (Section 3.2).
      labels = [table[encode(label)].mean(axis=0) for label in self.labels]
      labels = labels[: self.length]
      prompt[: len(labels)] = np.reshape(labels, (len(labels), shape[1]))
      prompt = prompt * np.float32(embedding_scale)
    return {path: np.asarray(prompt, np.float32)}

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raises UserError, because weights cannot express a prompt."""
    raise UserError(
      'a prompt cannot be merged into the weights: export it by itself, '
      'python -m dst_t5x.convert MODEL_DIR TARGET --format=peft'
    )

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    del modules, base
    return {
      'num_virtual_tokens': self.length,
      'num_transformer_submodules': 1,  # That which reads the inputs.
    }

  @classmethod
  def peft_read(
    cls,
    stated: json_object.JsonObject,
    modules: Collection[str],
    base: peft.Base,
  ) -> 'Prompt':
    """See `adapters.Adapter`."""
    del modules, base
    return cls(length=stated.size('num_virtual_tokens'))

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    del modules
    # PEFT makes a second one for a second submodule, but never looks at it.
    return [
      peft.Tensor(
        '/'.join(filter(None, (table, _NAME))),
        'prompt_embeddings',
        (self.length, embed),
        (self.length, embed),
        may_be_twice=True,
      )
      for table, (_, embed) in base.tables.items()
    ]
