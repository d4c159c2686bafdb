"""Names alone say the same as a model's config."""

import decoder_only
import pytest
import tiny_t5

from dst_t5x.models import hf_places
from dst_t5x.models.decoder_only import hf_names as decoder_only_names
from dst_t5x.models.t5 import hf_names as t5_names


def _layout(family):
  if family == 't5':
    return t5_names.layout(tiny_t5.CONFIG, 32)
  return decoder_only_names.layout(decoder_only.tiny(family).config)


def _places(layout):
  return {t.path: (name, t.transposed) for name, t in layout.items()}


@pytest.mark.parametrize('family', ['t5', *decoder_only.FAMILIES])
def test_names_tell_where_a_tensor_is(family):
  layout = _layout(family)
  found = hf_places.places(layout.keys(), {})
  assert found.tensors == _places(layout)
  assert not found.copies


def test_the_shared_table_of_t5_has_several_names():
  layout = _layout('t5')
  names = [*layout, *t5_names.COPIES]
  found = hf_places.places(names, {})
  assert found.tensors == _places(layout)
  assert found.copies == dict.fromkeys(t5_names.COPIES, 'shared.weight')
  # A file may have another of its names only, and the head not at all.
  names = {*names} - {'shared.weight', t5_names.COPIES[0], t5_names.HEAD}
  found = hf_places.places(names, {})
  only = t5_names.COPIES[1]
  assert found.tensors.keys() == _places(layout).keys()
  assert found.tensors['token_embedder/embedding'] == (only, False)
  assert found.tensors['decoder/logits_dense/kernel'] == (only, True)
  assert not found.copies


def test_a_tied_head_is_the_embedding():
  layout = _layout('qwen3')
  head = {'lm_head.weight': 'model.embed_tokens.weight'}
  found = hf_places.places([*layout, *head], head)
  assert found == (_places(layout), head)
  untied = hf_places.places([*layout, *head], {})
  assert untied.tensors['decoder/logits_dense/kernel'] == (*head, True)
  assert hf_places.tied_by({'model_type': 'gemma2'}) == head
  assert hf_places.tied_by({'model_type': 'llama'}) == {}
  llama = {'model_type': 'llama', 'tie_word_embeddings': True}
  assert hf_places.tied_by(llama) == head


@pytest.mark.parametrize(
  'name',
  [
    'encoder.block.0.layer.0.SelfAttention.x.weight',
    'encoder.block.0.layer.2.DenseReluDense.wo.weight',
    'encoder.block.0.layer.1.DenseReluDense.wi.weight',
    'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight',
    'decoder.block.0.layer.1.SelfAttention.q.weight',
    'encoder.block.0.layer.0.SelfAttention.q.bias',
    'model.layers.0.mlp.experts.0.up_proj.weight',
    'model.layers.0.input_layernorm.bias',
    'transformer.h.0.attn.c_attn.weight',
  ],
)
def test_an_unknown_model_keeps_its_names(name):
  for family in ('t5', 'llama3'):
    names = [*_layout(family), name]
    found = hf_places.places(names, {})
    assert found.tensors == {n: (n, False) for n in names}
