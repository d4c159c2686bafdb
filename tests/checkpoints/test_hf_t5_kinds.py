"""Hugging Face's T5-like models: T5 1.1, Flan-T5, ByT5, mT5; not UMT5."""

import numpy as np
import pytest

from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

_SIZES = {
  'd_model': 12,
  'd_kv': 4,
  'd_ff': 20,
  'num_heads': 3,
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
  'decoder_start_token_id': 0,
}
# As google's config.json files state it, but for the sizes.
_KINDS = {
  't5_v1_1': ('T5', {'vocab_size': 64, 'num_layers': 2}),
  'flan_t5': ('T5', {'vocab_size': 64, 'num_layers': 2, 'n_positions': 512}),
  'byt5': ('T5', {'vocab_size': 384, 'num_layers': 3, 'num_decoder_layers': 1}),
  'mt5': ('MT5', {'vocab_size': 250, 'num_layers': 2}),
}


def _peer(prefix, sizes):
  config = getattr(transformers, f'{prefix}Config')(**_SIZES, **sizes)
  torch.manual_seed(1)
  model = getattr(transformers, f'{prefix}ForConditionalGeneration')(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.3)
  return model.eval()


@pytest.mark.parametrize('kind', _KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind):
  peer = _peer(*_KINDS[kind])
  peer.save_pretrained(tmp_path)
  seed = seeds.load_seed(tmp_path)
  tokens = np.arange(2, 32).reshape(2, 15)
  inputs = np.pad(tokens[:, :-1] + 3, [(0, 0), (1, 0)])
  batch = {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': inputs,
    'decoder_target_tokens': tokens + 3,
  }
  ours = seed.network.logits(seed.params, batch)
  with torch.no_grad():
    theirs = peer(
      input_ids=torch.from_numpy(tokens),
      decoder_input_ids=torch.from_numpy(inputs),
    ).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_umt5_is_refused_by_name(tmp_path):
  _peer('UMT5', {'vocab_size': 64, 'num_layers': 2}).save_pretrained(tmp_path)
  with pytest.raises(errors.UserError, match="has model_type 'umt5'") as caught:
    seeds.load_seed(tmp_path)
  assert '\n' not in str(caught.value)
