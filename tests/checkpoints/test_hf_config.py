"""The keys of a config.json, compared with transformers."""

import dataclasses
import inspect
import json
import pathlib
import re
import shutil

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import networks
import numpy as np
import pytest
import refusals
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import errors

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

BATCH = networks.random_batch(2, 7, 5)
T5 = transformers.T5ForConditionalGeneration


@dataclasses.dataclass(repr=False)  # Hypothesis would show it whole.
class Base:
  folder: pathlib.Path
  params: dict
  logits: np.ndarray


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A folder, and the logits of our network: [rows, length, vocabulary]."""
  model = networks.tiny()
  params = networks.random_params(model)
  folder = tmp_path_factory.mktemp('hf') / 'model'
  hf_checkpoint.save(folder, params, model)
  return Base(folder, params, networks.logits(model, params, BATCH))


def _with(base, tmp_path_factory, changes):
  """Returns a copy of the folder with another config.json."""
  folder = tmp_path_factory.mktemp('changed') / 'model'
  shutil.copytree(base.folder, folder)
  file = folder / 'config.json'
  stated = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps(stated))
  return folder


def _their_logits(folder):
  """Returns transformers' logits at all targets, by passing labels."""
  model = T5.from_pretrained(folder, dtype=torch.float32).eval()
  labels = torch.from_numpy(BATCH['decoder_target_tokens']).long()
  tokens = torch.from_numpy(BATCH['encoder_input_tokens']).long()
  with torch.no_grad():
    return model(
      input_ids=tokens,
      attention_mask=(tokens > 0).long(),
      labels=labels.masked_fill(labels == 0, -100),
    ).logits.numpy()


def _assert_same(ours, theirs):
  real = BATCH['decoder_target_tokens'] > 0
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4)


def _keys():
  """Returns all keys that transformers writes, accepts, or computes with."""
  source = inspect.getsource(inspect.getmodule(T5))
  return sorted(
    set(transformers.T5Config().to_dict())
    | set(transformers.T5Config.attribute_map)
    | set(re.findall(r'config\.([a-z]\w+)', source))
    | {'pruned_heads', 'quantization_config', 'tie_encoder_decoder'}
  )


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-2, 20),
  st.sampled_from([32, 48, 64, 128, 0.0, 0.5, 1.0, 1e-6, 1e-5, 1e-3]),
  st.sampled_from(
    ['relu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gated-gelu', 'silu']
  ),
  st.sampled_from(['gated-relu', 'gated-gelu_new', 'float32', 't5', 'x']),
  st.sampled_from([[], {}, [1], [0], {'0': [1]}]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  changes=st.dictionaries(
    st.sampled_from(_keys()), VALUES, min_size=1, max_size=3
  )
)
def test_what_is_not_refused_is_computed_alike(base, tmp_path_factory, changes):
  folder = _with(base, tmp_path_factory, changes)
  said = refusals.refusal(hf_checkpoint.load, folder)
  if said is None:
    tiny_t5.assert_same_bits(hf_checkpoint.load(folder).params, base.params)
    try:
      theirs = _their_logits(folder)
    except Exception:  # Refused, by one of many kinds of errors.
      return
    _assert_same(base.logits, theirs)
  else:
    assert 'tensor' in said or any(key in said for key in changes), said


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dense_act_fn': 'relu'}, "dense_act_fn 'relu'"),
    ({'dense_act_fn': 'gelu'}, "dense_act_fn 'gelu'"),
    ({'is_gated_act': False}, 'is_gated_act False'),
    ({'feed_forward_proj': 'gated-silu'}, "feed_forward_proj 'gated-silu'"),
    ({'decoder_start_token_id': 3}, 'decoder_start_token_id 3, not 0'),
    ({'layer_norm_epsilon': 1e-2}, 'layer_norm_epsilon 0.01, not 1e-06'),
    (
      {'num_attention_heads': 9, 'head_dim': 2},
      "head_dim must be d_kv's 6, it is 2",
    ),
    ({'num_hidden_layers': 1}, "num_hidden_layers must be num_layers's 2"),
    ({'scale_decoder_outputs': True}, 'ties the output'),
  ],
)
def test_what_changes_logits_is_refused_by_name(
  base, tmp_path_factory, changes, message
):
  folder = _with(base, tmp_path_factory, changes)
  with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
    hf_checkpoint.load(folder)
  assert '\n' not in str(caught.value)
  try:
    theirs = _their_logits(folder)
  except RuntimeError:  # Shapes do not fit.
    return
  with pytest.raises(AssertionError):
    _assert_same(base.logits, theirs)


@pytest.mark.parametrize(
  'changes',
  [
    {'quantization_config': {'quant_method': 'bitsandbytes'}},
    {'transformers_weights': 'other.safetensors'},
    {'tie_encoder_decoder': True},
    {'pruned_heads': {'0': [1]}},
    {'eos_token_id': 5},
    {'pad_token_id': 3},
    {'relative_attention_max_distance': 64},
  ],
)
def test_what_we_lack_is_refused_by_name(base, tmp_path_factory, changes):
  (key,) = changes
  with pytest.raises(errors.UserError, match=key) as caught:
    hf_checkpoint.load(_with(base, tmp_path_factory, changes))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'dense_act_fn': 'gelu_new', 'is_gated_act': True},
    {'dense_act_fn': 'gelu_pytorch_tanh'},
    {'feed_forward_proj': 'gated-gelu_new'},
    {'feed_forward_proj': 'relu', 'dense_act_fn': 'gelu_new',
     'is_gated_act': True},
    {'hidden_size': 16, 'head_dim': 6, 'num_hidden_layers': 2},
    {'tie_word_embeddings': True, 'scale_decoder_outputs': False},
    {'num_beams': 4, 'max_length': 300, 'task_specific_params': {'x': {}}},
    {'n_positions': 512, 'output_past': True, 'eos_token_id': [1]},
  ],
)  # fmt: skip
def test_what_changes_nothing_is_read(base, tmp_path_factory, changes):
  folder = _with(base, tmp_path_factory, changes)
  tiny_t5.assert_same_bits(hf_checkpoint.load(folder).params, base.params)
  _assert_same(base.logits, _their_logits(folder))


@pytest.mark.parametrize('name', ['d_model', 'num_layers', 'num_heads'])
def test_either_name_of_a_size_is_read(base, tmp_path_factory, name):
  alias = transformers.T5Config.attribute_map
  alias = {ours: theirs for theirs, ours in alias.items()}[name]
  value = json.loads((base.folder / 'config.json').read_text())[name]
  folder = _with(base, tmp_path_factory, {name: None, alias: value})
  tiny_t5.assert_same_bits(hf_checkpoint.load(folder).params, base.params)


SIZES = [
  'relative_attention_num_buckets',
  'vocab_size',
  'd_model',
  'd_kv',
  'd_ff',
  'num_layers',
  'num_heads',
]


@pytest.mark.parametrize('key', [*SIZES, 'num_decoder_layers', 'dropout_rate'])
@pytest.mark.parametrize(
  'value',
  ['8', 8.0, True, [], {}, 0, -1, 2**31, 10**400, '\ud800', 'x' * 9999],
)
def test_what_is_no_size_is_named(base, tmp_path_factory, key, value):
  if (key, value) in (('dropout_rate', 0), ('dropout_rate', 8.0)):
    value = 1.0
  folder = _with(base, tmp_path_factory, {key: value})
  for read in (hf_checkpoint.load, hf_checkpoint.model_of):
    with pytest.raises(errors.UserError, match=f'{key} must be') as caught:
      read(folder)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


@pytest.mark.parametrize(
  'text', ['', '{', '[]', 'null', '"x"', '{"d_ff": NaN}', '{"d_ff": 1e999}',
           '[' * 100_000, '{"a": ' * 100_000, b'\xff\xfe\xff'],
)  # fmt: skip
def test_what_is_no_object_is_named(base, tmp_path_factory, text):
  folder = _with(base, tmp_path_factory, {})
  text = text if isinstance(text, bytes) else text.encode()
  (folder / 'config.json').write_bytes(text)
  with pytest.raises(errors.UserError, match=r'config\.json') as caught:
    hf_checkpoint.load(folder)
  assert '\n' not in str(caught.value)
