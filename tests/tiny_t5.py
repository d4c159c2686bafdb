"""A tiny T5 1.1, the shapes of Small, and random parameters for them."""

import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.models.t5 import network

CONFIG = network.T5Config(
  vocab_size=48,
  emb_dim=8,
  num_heads=2,
  num_encoder_layers=3,
  num_decoder_layers=2,
  head_dim=6,
  mlp_dim=20,
  mlp_activations=('gelu', 'linear'),
)
NETWORK = network.Transformer(CONFIG)
SMALL = dataclasses.replace(
  CONFIG,
  vocab_size=32_128,
  emb_dim=512,
  num_heads=6,
  num_encoder_layers=8,
  num_decoder_layers=8,
  head_dim=64,
  mlp_dim=1024,
)


def shapes(config: network.T5Config = CONFIG) -> dict[str, Any]:
  """The network's own parameter tree, of jax.ShapeDtypeStruct."""
  tokens = jnp.ones((1, 4), jnp.int32)
  module = network.Transformer(config)
  variables = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )
  return variables['params']


def random_params(config: network.T5Config = CONFIG) -> dict[str, Any]:
  """Parameters of that tree, normal random float32."""
  generator = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: generator.standard_normal(leaf.shape, np.float32),
    shapes(config),
  )


def flat(params: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep='/')


def assert_same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
  left, right = flat(left), flat(right)
  assert left.keys() == right.keys()
  for path, array in left.items():
    assert array.dtype == right[path].dtype, path
    assert array.shape == right[path].shape, path
    assert array.tobytes() == right[path].tobytes(), path
