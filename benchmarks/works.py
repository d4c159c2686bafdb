"""The models that benchmarks time, with batches of random tokens.

Their sizes are those of `gin/models/`, whose files are read without importing
what they name: an accelerator's machine may have neither seqio nor TensorFlow.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.config import gin_files
from dst_t5x.core import parts
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import api
from dst_t5x.models.decoder_only import network as decoder_only
from dst_t5x.models.decoder_only import rope
from dst_t5x.models.t5 import network as t5

PyTree = Any
_ATTENTION = '.*attention/(query|key|value|out)'


@dataclasses.dataclass(frozen=True)
class Work:
  """A model and the size of its batches.

  Attributes:
    network: without an adapter.
    tokens: returns a batch, given a random generator, the number of rows and
      the numbers of input and target tokens.
    prefixed: puts the placeholders of a trained prompt, int32 `[length]`,
      before the rows of a batch.
    modules: PEFT's names of the four linear maps of attention.
    rows: of a batch.
    inputs: tokens a row.
    targets: tokens a row.
  """

  network: api.Network
  tokens: Callable[[np.random.Generator, int, int, int], dict[str, np.ndarray]]
  prefixed: Callable[[trainer_lib.Batch, np.ndarray], trainer_lib.Batch]
  modules: tuple[str, ...]
  rows: int
  inputs: int
  targets: int
  lora_targets: str = _ATTENTION

  def batch(self, random: np.random.Generator) -> trainer_lib.Batch:
    """Returns random tokens without padding."""
    batch = self.tokens(random, self.rows, self.inputs, self.targets)
    return {name: jnp.asarray(array) for name, array in batch.items()}


def params(network: api.Network) -> PyTree:
  """Returns random parameters; norms start at 1."""
  drawn = parts.flatten(normal(api.shapes(network), jax.random.key(0)))
  for path, tensor in drawn.items():
    if path.endswith('scale'):
      drawn[path] = jnp.ones_like(tensor)
  return parts.unflatten(drawn)


def normal(shapes: PyTree, key: jax.Array, deviation: float = 0.05) -> PyTree:
  """Returns normally distributed float32 tensors of these shapes.

  Each shape is compiled once; `initialize` in one program compiles for long.
  """
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(key, len(leaves))
  drawn = [
    _normal(k, leaf.shape, deviation)
    for k, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnums=1)
def _normal(
  key: jax.Array, shape: tuple[int, ...], deviation: float
) -> jax.Array:
  return deviation * jax.random.normal(key, shape)


def _t5_tokens(
  random: np.random.Generator, rows: int, inputs: int, targets: int
) -> dict[str, np.ndarray]:
  encoder = random.integers(2, 32000, (rows, inputs)).astype(np.int32)
  decoder = random.integers(2, 32000, (rows, targets)).astype(np.int32)
  return {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': np.roll(decoder, 1, axis=1),
    'decoder_target_tokens': decoder,
    'decoder_loss_weights': np.ones(decoder.shape, np.int32),
  }


def _t5_prefixed(
  batch: trainer_lib.Batch, prefix: np.ndarray
) -> trainer_lib.Batch:
  name = 'encoder_input_tokens'
  return {**batch, name: _before(prefix, batch[name])}


def _decoder_only_tokens(
  random: np.random.Generator, rows: int, inputs: int, targets: int
) -> dict[str, np.ndarray]:
  tokens = random.integers(2, 32000, (rows, inputs + targets + 1))
  tokens = tokens.astype(np.int32)
  weights = np.zeros((rows, inputs + targets), np.int32)
  weights[:, inputs:] = 1
  return {
    'decoder_input_tokens': tokens[:, :-1],
    'decoder_target_tokens': tokens[:, 1:],
    'decoder_loss_weights': weights,
  }


def _decoder_only_prefixed(
  batch: trainer_lib.Batch, prefix: np.ndarray
) -> trainer_lib.Batch:
  # The placeholders are no targets: their weights are 0.
  return {
    name: _before(
      prefix if name == 'decoder_input_tokens' else np.zeros_like(prefix), rows
    )
    for name, rows in batch.items()
  }


def _before(prefix: np.ndarray, rows: jax.Array) -> jax.Array:
  return jnp.hstack([np.tile(prefix, (len(rows), 1)), rows])


_ENCODER_DECODER: dict[str, Any] = {
  'tokens': _t5_tokens,
  'prefixed': _t5_prefixed,
  'modules': ('q', 'k', 'v', 'o'),
}
_DECODER_ONLY: dict[str, Any] = {
  'tokens': _decoder_only_tokens,
  'prefixed': _decoder_only_prefixed,
  'modules': ('q_proj', 'k_proj', 'v_proj', 'o_proj'),
}
# The sizes of batches on two cores of a CPU: rows, inputs and targets.
_ROWS = {
  't5_1_1_tiny': (8, 128, 32),
  't5_1_1_small': (8, 128, 32),
  't5_1_1_base': (8, 128, 32),
  't5_1_1_large': (8, 128, 32),
  't5_1_1_xl': (8, 128, 32),
  'smollm2_135m': (4, 128, 128),
  'llama3_2_1b': (4, 128, 128),
}
NAMES = tuple(_ROWS)


def make(name: str, **changes: Any) -> Work:
  """Returns a work of `NAMES`.

  Args:
    name: the name of a file in `gin/models/`.
    **changes: options of the network, instead of the file's.
  """
  network = network_of(name, **changes)
  is_t5 = isinstance(network, t5.Transformer)
  rows, inputs, targets = _ROWS[name]
  return Work(
    network,
    **(_ENCODER_DECODER if is_t5 else _DECODER_ONLY),
    rows=rows,
    inputs=inputs,
    targets=targets,
  )


def network_of(name: str, **changes: Any) -> api.Network:
  """Returns the network of a file in `gin/models/`, without dropout."""
  stated = gin_files.literals(f'gin/models/{name}.gin')

  def fields(prefix: str) -> dict[str, Any]:
    return {
      key.removeprefix(prefix): value
      for key, value in stated.items()
      if key.startswith(prefix) and value is not None
    }

  changes = {
    'dtype': stated['ACTIVATION_DTYPE'],
    'dropout_rate': 0.0,
    **changes,
  }
  if sizes := fields('network.T5Config.'):
    return t5.Transformer(t5.T5Config(**{**sizes, **changes}))
  sizes = fields('network.DecoderConfig.') | {
    'eos_id': stated['EOS_ID'],
    'rope': rope.Rope(**fields('rope.Rope.')),
  }
  return decoder_only.Transformer(
    decoder_only.DecoderConfig(**{**sizes, **changes})
  )
