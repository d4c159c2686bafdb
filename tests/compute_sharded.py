"""Computes on one device and on a mesh of eight, which divides everything.

A row of JSON for each network: how far the loss, its gradients and decoded
tokens are from those of one device. A process of its own, because JAX has to be
told the number of devices before it starts.
"""

import json

import decoder_only
import jax
import networks
import numpy as np

from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.engine import losses
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import adapted
from dst_t5x.models import decoding
from dst_t5x.models.decoder_only import network as decoder_only_network

_ROWS, _INPUTS, _TARGETS = 8, 7, 6
_EVEN = {'num_heads': 4, 'scan_layers': True, 'remat': True}


def _decoder_only(family, **changes):
  settings = {**decoder_only.FAMILIES[family], **changes}
  return decoder_only_network.Transformer(
    decoder_only_network.DecoderConfig(
      **{**decoder_only._SIZES, **settings, 'scan_layers': True}
    )
  )


_NETWORKS = {
  't5': networks.tiny(**_EVEN, dropout_rate=0.1),
  # Neither the pieces nor the heads can be divided by two.
  't5, tied': networks.tiny(
    vocab_size=47,
    num_encoder_layers=1,
    num_decoder_layers=1,
    logits_via_embedding=True,
  ),
  'prompt': networks.tiny(prompts.Prompt(4), **_EVEN),
  'gemma2, tied': _decoder_only('gemma2'),
  'lora': adapted.with_adapter(_decoder_only('llama3'), lora.LoRA(rank=2)),
}
_DECODED = ('t5', 'gemma2, tied')


def _batch(network):
  """Returns random tokens, of which some are placeholders of a prompt."""
  random = np.random.default_rng(0)
  lengths = {'inputs': _INPUTS, 'targets': _TARGETS}
  shapes = network.batch_shapes(lengths, _ROWS, pack=False)
  vocabulary = network.vocab_size - 1
  batch = {
    name: random.integers(2, vocabulary, shape).astype(np.int32)
    for name, shape in shapes.items()
  }
  if 'decoder_loss_weights' in batch:
    batch['decoder_loss_weights'][:] = 1
  prefix = network.adapter.prefix(network.vocab_size)
  batch[network.base.inputs[0]][:, : len(prefix)] = prefix
  return batch


def _compute(network, params, batch, place):
  """Returns the loss and its gradients, and what the program does."""

  def loss(params, batch, key):
    sums = losses.forward(network, losses.Loss(), params, batch, key)
    return sums.loss

  placed = place(batch)
  compute = jax.jit(jax.value_and_grad(loss))
  compiled = compute.lower(params, placed, jax.random.key(0)).compile()
  value, gradients = compiled(params, placed, jax.random.key(0))
  # An id that has no embedding is no embedding.
  wrong = {name: x.copy() for name, x in batch.items()}
  wrong[network.base.inputs[0]][3, 2] = network.vocab_size + 9
  is_nan = np.isnan(compiled(params, place(wrong), jax.random.key(0))[0])
  return value, jax.device_get(gradients), bool(is_nan), compiled.as_text()


def _decode(network, params, batch, place):
  prompts = place({'x': batch[network.base.inputs[0]]})['x']
  decode = jax.jit(
    lambda params, rows: decoding.BeamSearch(2)(network, params, rows, 5)
  )
  return np.asarray(decode(params, prompts)[0])


def _row(name, network):
  partitioner = partitioning.Partitioner(2, 2)
  host = jax.tree_util.tree_map_with_path(
    # Large ones make attention a maximum, whose gradients are mere rounding.
    lambda path, x: 0.1 * x if 'lora' in jax.tree_util.keystr(path) else x,
    networks.random_params(network),
  )
  batch = _batch(network)
  one = _compute(network, host, batch, dict)
  tokens = same = None
  if name in _DECODED:
    tokens = _decode(network, host, batch, dict)
  with partitioner.activate():
    space = parameters.ParameterSpace(network, partitioner)
    params = jax.tree.map(partitioning.place, host, space.shardings)
    many = _compute(network, params, batch, partitioner.place_batch)
    if name in _DECODED:
      same = _decode(network, params, batch, partitioner.place_batch)
  furthest = max(
    float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) + 1e-6))
    for a, b in zip(
      jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True
    )
  )
  return {
    'name': name,
    'loss': abs(float(many[0]) / float(one[0]) - 1),
    'gradients': furthest,
    'is_finite': bool(np.isfinite(one[0])),
    'wrong_id_is_nan': one[2] and many[2],
    'exchanges': 'all-to-all' in many[3],
    'decodes_the_same': np.array_equal(tokens, same),
  }


def main() -> None:
  """Prints the rows."""
  assert len(jax.devices()) == 8
  for name, network in _NETWORKS.items():
    print(json.dumps(_row(name, network)), flush=True)


if __name__ == '__main__':
  main()
