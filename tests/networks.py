"""Tiny networks, batches and parameters that several tests share."""

from typing import Any

from flax import traverse_util
import jax
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.engine import parameters
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.models.t5 import network

VOCAB = 48
TINY = {
  'vocab_size': VOCAB,
  'emb_dim': 16,
  'num_heads': 3,
  'num_encoder_layers': 2,
  'num_decoder_layers': 3,
  'head_dim': 6,
  'mlp_dim': 20,
  'mlp_activations': ('gelu', 'linear'),
}


def tiny(
  adapter: adapters.Adapter | None = None, **changes: Any
) -> api.Network:
  """Returns a network of a few thousand parameters."""
  model = network.Transformer(network.T5Config(**{**TINY, **changes}))
  return adapted.with_adapter(model, adapter)


def random_params(model: api.Network, seed: int = 0) -> dict:
  """Returns params of which every tensor, layer norms too, is random."""
  shapes = api.shapes(model)
  rng = np.random.default_rng(seed)

  def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape)
    if path.endswith('scale'):
      x = 1 + 0.3 * x
    elif path.endswith('kernel'):
      x /= np.sqrt(shape[-2])
    return x.astype(np.float32)

  drawn = {path: draw(path, leaf.shape) for path, leaf in flat(shapes).items()}
  return traverse_util.unflatten_dict(drawn, sep='/')


def random_batch(
  batch: int, encoder_length: int, decoder_length: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns a batch of examples of differing length, padded at their end."""
  rng = np.random.default_rng(seed)
  encoder = rng.integers(2, VOCAB, (batch, encoder_length), dtype=np.int32)
  targets = rng.integers(2, VOCAB, (batch, decoder_length), dtype=np.int32)
  for row in range(1, batch):  # The first is full.
    encoder[row, rng.integers(1, encoder_length + 1) :] = 0
    targets[row, rng.integers(1, decoder_length + 1) :] = 0
  return {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }


def with_fixed(model: api.Network, params: dict) -> dict:
  """Returns unstacked params with the adapter's fixed tensors."""
  return parameters.with_fixed(model, api.shapes(model), params)


def logits(model: api.Network, params: dict, batch: dict) -> np.ndarray:
  """Returns the logits, without dropout, as a NumPy array."""
  return np.asarray(jax.jit(model.logits)(params, batch))


def flat(tree: dict) -> dict[str, Any]:
  """Returns the leaves by their path, the keys joined with `/`."""
  return traverse_util.flatten_dict(tree, sep='/')
