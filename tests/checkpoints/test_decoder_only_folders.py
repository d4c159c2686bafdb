"""Folders of decoder-only models, against transformers: both ways."""

import decoder_only
from decoder_only import FAMILIES
import numpy as np
import pytest

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.models import families

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.random.default_rng(0).integers(2, 60, (2, 11), np.int32)


def _their_logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def _our_logits(model, params):
  return np.asarray(model.logits(params, {'decoder_input_tokens': TOKENS}))


def _from_pretrained(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation='eager', dtype=torch.float32
  ).eval()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_folder_of_theirs(family, tmp_path):
  _, _, theirs = decoder_only.pair(family)
  theirs.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  model = hf_checkpoint.model_of(tmp_path).network
  params = hf_checkpoint.load(tmp_path).params
  assert families.of(params).task_type == 'CAUSAL_LM'
  np.testing.assert_allclose(
    _our_logits(model, params), _their_logits(theirs), atol=1e-4
  )


@pytest.mark.parametrize('family', FAMILIES)
def test_a_folder_of_ours(family, tmp_path):
  model, params, _ = decoder_only.pair(family)
  hf_checkpoint.save(tmp_path / 'model', params, model)
  np.testing.assert_allclose(
    _their_logits(_from_pretrained(tmp_path / 'model')),
    _our_logits(model, params),
    atol=1e-4,
  )
  back = parts.flatten(hf_checkpoint.load(tmp_path / 'model').params)
  for path, tensor in parts.flatten(params).items():
    assert np.asarray(tensor).tobytes() == back[path].tobytes(), path


def test_bfloat16_is_read_as_it_is(tmp_path):
  _, _, theirs = decoder_only.pair('llama3')
  rounded = type(theirs)(theirs.config)
  rounded.load_state_dict(theirs.state_dict())
  rounded.to(torch.bfloat16).save_pretrained(tmp_path)
  params = hf_checkpoint.load(tmp_path).params
  table = rounded.get_input_embeddings().weight.detach().float().numpy()
  assert (params['token_embedder']['embedding'] == table).all()


def test_shapes_do_not_tell_the_network():
  _, params, _ = decoder_only.pair('llama3')
  with pytest.raises(errors.UserError, match='do not tell its heads, RoPE'):
    families.network_of(params)
