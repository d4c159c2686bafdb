"""The models that `train_step` times, with batches of random tokens."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import api
from dst_t5x.models.decoder_only import network as decoder_only
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
  """Returns random parameters."""
  return jax.jit(network.initialize)(jax.random.key(0))['params']


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


WORKS = {
  't5_1_1_small': Work(
    t5.Transformer(
      t5.T5Config(
        vocab_size=32128,
        emb_dim=512,
        num_heads=6,
        num_encoder_layers=8,
        num_decoder_layers=8,
        head_dim=64,
        mlp_dim=1024,
        mlp_activations=('gelu', 'linear'),
        dropout_rate=0.0,
      )
    ),
    _t5_tokens,
    _t5_prefixed,
    ('q', 'k', 'v', 'o'),
    rows=8,
    inputs=128,
    targets=32,
  ),
  'smollm2_135m': Work(
    decoder_only.Transformer(
      decoder_only.DecoderConfig(
        vocab_size=49152,
        emb_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        context_length=8192,
        norm_epsilon=1e-5,
        rope=decoder_only.Rope(1e5),
        eos_id=0,
      )
    ),
    _decoder_only_tokens,
    _decoder_only_prefixed,
    ('q_proj', 'k_proj', 'v_proj', 'o_proj'),
    rows=4,
    inputs=128,
    targets=128,
  ),
}
