"""Folders of tiny Hugging Face models, and subsets of them."""

import decoder_only
import numpy as np
import subsets
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint

FAMILIES = ('t5', *decoder_only.FAMILIES)


def network_of(family):
  """Returns a network and random parameters."""
  if family == 't5':
    return tiny_t5.NETWORK, tiny_t5.random_params()
  network = decoder_only.tiny(family)
  return network, decoder_only.random_params(network)


def save(folder, family):
  """Writes a folder of Hugging Face's; returns network and parameters."""
  network, params = network_of(family)
  hf_checkpoint.save(folder, params, network)
  return network, params


def load(folder, **options):
  """Returns Transformers' model of a folder."""
  import transformers

  config = transformers.AutoConfig.from_pretrained(folder)
  config._attn_implementation = 'eager'
  kind = getattr(transformers, config.architectures[0])
  options = {'dtype': 'float32', **options}
  return kind.from_pretrained(folder, config=config, **options).eval()


def subset_of(params, share=0.05, seed=0):
  """Returns a random subset of parameters, and the tuned parameters."""
  return subsets.random_subset(params, share, np.random.default_rng(seed))


def logits(family, network, params, tokens):
  """Returns our logits."""
  batch = {'decoder_input_tokens': tokens}
  if family == 't5':
    batch['encoder_input_tokens'] = tokens
    batch['decoder_target_tokens'] = tokens
  return np.asarray(network.logits(params, batch))


def their_logits(family, model, tokens):
  """Returns Transformers' logits."""
  import torch

  ids = torch.from_numpy(tokens).long()
  names = ['input_ids', *(['decoder_input_ids'] if family == 't5' else [])]
  with torch.no_grad():
    found = model(**dict.fromkeys(names, ids), use_cache=False)
  return found.logits.float().numpy()


def bits_of(model):
  """Returns name -> the bytes of a tensor, of all of a module."""
  import torch

  return {
    name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    .numpy().tobytes()
    for name, tensor in model.state_dict().items()
  }  # fmt: skip
