"""A network unlike T5: one causal stack without attention; for test_contract.

A token's prediction comes from the mean of all embeddings up to it. Everything
that the package asks of a network is here, see `models.api`.
"""

from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

from dst_t5x.models import api

_NORMAL = nn.initializers.normal(0.1)


class Linear(nn.Module):
  features: int
  axes: tuple[str, str]
  kernel_init: Any = _NORMAL

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    kernel = partitioning.param_with_axes(
      'kernel', self.kernel_init, shape, jnp.float32, axes=self.axes
    )
    bias = partitioning.param_with_axes(
      'bias', _NORMAL, shape[1:], jnp.float32, axes=self.axes[1:]
    )
    return x @ kernel + bias


class Embed(nn.Module):
  vocab_size: int
  features: int

  def setup(self):
    shape = self.vocab_size, self.features
    self.embedding = partitioning.param_with_axes(
      'embedding', _NORMAL, shape, axes=('vocab', 'embed')
    )

  def __call__(self, tokens):
    return self.embedding[tokens]

  def attend(self, x):
    return x @ self.embedding.T


class Gain(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * partitioning.param_with_axes(
      'gain', nn.initializers.ones, x.shape[-1:], jnp.float32, axes=('embed',)
    )


class Causal(nn.Module, api.Network):
  vocab_size: int = 264
  width: int = 24
  layers: int = 2

  scan_layers = False
  remat = False
  output_matrix = 'output/kernel'

  def setup(self):
    self.table = Embed(self.vocab_size, self.width)
    self.gain = Gain()
    self.stack = [
      Linear(self.width, ('embed', 'mlp'), name=f'layers_{i}')
      for i in range(self.layers)
    ]
    self.output = Linear(self.vocab_size, ('embed', 'vocab'))

  def sums(self, tokens):
    return self.table(tokens)

  def predict(self, sums, counts):
    x = self.gain(sums / counts)
    for layer in self.stack:
      x = x + jnp.tanh(layer(x))
    return self.output(x)

  def __call__(self, tokens, segments):
    seen = jnp.tril(segments[:, :, None] == segments[:, None, :])
    sums = jnp.einsum('bqk,bkd->bqd', seen, self.sums(tokens))
    return self.predict(sums, seen.sum(-1, keepdims=True))

  @nn.nowrap
  def initialize(self, key):
    tokens = jnp.ones((1, 2), jnp.int32)
    return self.init(key, tokens, tokens)

  @nn.nowrap
  def logits(self, params, batch, dropout_key=None):
    del dropout_key
    tokens = batch['decoder_input_tokens']
    segments = batch.get('decoder_segment_ids', jnp.ones_like(tokens))
    return self.apply({'params': params}, tokens, segments)

  @nn.nowrap
  def targets(self, batch):
    return api.Targets(
      batch['decoder_target_tokens'],
      batch['decoder_loss_weights'],
      batch.get('decoder_segment_ids'),
    )

  @nn.nowrap
  def feature_converter(self, pack, prefix=()):
    import seqio

    assert not prefix
    return seqio.PrefixLMFeatureConverter(pack=pack)

  @nn.nowrap
  def batch_shapes(self, feature_lengths, rows, pack):
    names = ['input_tokens', 'target_tokens', 'loss_weights']
    names += ['segment_ids', 'positions'] if pack else []
    length = sum(feature_lengths.values())
    return {f'decoder_{name}': (rows, length) for name in names}

  @nn.nowrap
  def prompt(self, example):
    # Its inputs, behind the token that begins every example.
    is_input = example['decoder_causal_attention'] > 0
    return jnp.where(is_input, example['decoder_input_tokens'], 0)

  @nn.nowrap
  def prompt_of_inputs(self, inputs, prefix=()):
    return jnp.concatenate([jnp.array([0, *prefix], jnp.int32), inputs])

  @nn.nowrap
  def start_decoding(self, params, prompts, beams, max_decode_length):
    del max_decode_length
    prompts = jnp.repeat(prompts, beams, axis=0)
    variables = {'params': params}
    counts = (prompts[:, 1:] > 0).sum(1)  # Behind the token that begins.
    is_read = jnp.arange(prompts.shape[1]) < counts[:, None]
    sums = self.apply(variables, prompts, method='sums')
    first = jnp.take_along_axis(prompts, counts[:, None], axis=1)[:, 0]

    def step(tokens, cache):
      sums = cache['sums'] + self.apply(variables, tokens, method='sums')
      counts = cache['counts'] + 1
      logits = self.apply(variables, sums, counts, method='predict')
      return logits, {'sums': sums, 'counts': counts}

    cache = {
      'sums': (sums * is_read[..., None]).sum(1),
      'counts': counts[:, None].astype(jnp.float32),
    }
    return api.DecodingStart(step, cache, 0, first)

  @nn.nowrap
  def work_of_example(self, shapes, feature_lengths):
    tokens = sum(feature_lengths.values())
    weights = [x.size for path, x in shapes.items() if path.endswith('kernel')]
    return api.Work(tokens, tokens * sum(weights))

  @nn.nowrap
  def share(self, devices):
    assert devices == 1
    return self


def random_params(seed=0):
  return jax.jit(Causal().initialize)(jax.random.key(seed))['params']
