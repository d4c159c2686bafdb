"""Tiny networks in Hugging Face folders, and subsets of them."""

from typing import Any, NamedTuple

import decoder_only
import networks
import numpy as np

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.models import families

BATCH = networks.random_batch(3, 7, 5)
TOKENS = np.random.default_rng(0).integers(2, decoder_only.VOCAB, (3, 11))


class Base(NamedTuple):
  """A tiny network with random parameters, in a Hugging Face folder."""

  family: str
  network: Any
  seed: seeds.Seed

  @property
  def path(self):
    return self.seed.path

  def theirs(self):
    """Returns Hugging Face's model of it."""
    import transformers

    is_t5 = self.family == 't5'
    kind = 'AutoModelForSeq2SeqLM' if is_t5 else 'AutoModelForCausalLM'
    return (
      getattr(transformers, kind)
      .from_pretrained(self.path, attn_implementation='eager')
      .eval()
    )

  def our_logits(self, params):
    """Returns logits [rows, length, vocab] of our network."""
    if self.family == 't5':
      logits = networks.logits(self.network, params, BATCH)
      return logits[BATCH['decoder_target_tokens'] > 0]
    batch = {'decoder_input_tokens': TOKENS.astype(np.int32)}
    return np.asarray(self.network.logits(params, batch))

  def their_logits(self, model):
    """Returns the same of a model in torch."""
    import torch

    inputs = {'input_ids': torch.from_numpy(TOKENS)}
    if self.family == 't5':
      tokens = torch.from_numpy(BATCH['encoder_input_tokens']).long()
      decoder = torch.from_numpy(BATCH['decoder_input_tokens']).long()
      inputs = {
        'input_ids': tokens,
        'attention_mask': (tokens > 0).long(),
        'decoder_input_ids': decoder,
      }
    with torch.no_grad():
      logits = model(**inputs).logits.numpy()
    is_real = BATCH['decoder_target_tokens'] > 0
    return logits[is_real] if self.family == 't5' else logits

  def our_form(self, model):
    """Returns the parameters of a model in torch, path -> array."""
    layout = families.of(self.seed.params).written(
      self.network, self.seed.params
    )[0]
    state = model.state_dict()
    return {
      tensor.path: state[name].numpy().T
      if tensor.transposed
      else state[name].numpy()
      for name, tensor in layout.tensors.items()
    }


def make(root, family):
  """Returns a Base in a new folder of `root`."""
  network, params = networks.tiny(), None
  if family != 't5':
    network = decoder_only.tiny(family)
    params = decoder_only.random_params(network)
  params = params or networks.random_params(network)
  for path, array in parts.flatten(params).items():
    if path.endswith('kernel'):  # Both zeros, which are kept apart.
      array[0, 0], array[1, 1] = -0.0, 0.0
  hf_checkpoint.save(root / family, params, network)
  return Base(family, network, seeds.load_seed(root / family))


def tuned(seed, pattern='/kernel', share=0.15):
  """Returns a subset with random values in all tensors of a name."""
  rng = np.random.default_rng(7)
  params = {}
  for path, array in parts.flatten(seed.params).items():
    params[path] = array.copy()
    if pattern in path:
      where = rng.choice(array.size, int(share * array.size) + 1, replace=False)
      new = rng.normal(0, 0.3, len(where)).astype(np.float32)
      params[path].reshape(-1)[where] = new
  return subsets.extract(parts.unflatten(params), seed.params, seed.fingerprint)


def save(path, subset, seed):
  subsets.save(path, subset, {'seed': seed.reference, 'step': 12})
  return path
