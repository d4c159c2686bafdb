"""GGUF files, with Transformers' own reader of them as the judge."""

import re

import gguf_files
import numpy as np
import pytest

from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import gguf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.data import tokenizers_vocabulary
from dst_t5x.data import vocabulary
from dst_t5x.models.decoder_only import hf_config

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

FAMILIES = sorted(gguf_files.ARCHITECTURES)


def _peer(path):
  """Returns Transformers' model of a GGUF file."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  return model.eval()


@pytest.mark.parametrize('quantisation', ['F32', 'F16', 'Q8_0', 'Q4_1'])
@pytest.mark.parametrize('family', FAMILIES)
def test_weights_and_sizes_are_those_that_transformers_reads(
  tmp_path, family, quantisation
):
  path = tmp_path / 'tiny.gguf'
  model = gguf_files.write(path, family, quantisation)
  network = gguf_checkpoint.load(path).network
  assert hf_config.config_to_hf(network.config) == (
    hf_config.config_to_hf(model.config)
  )
  line = conversion.convert(path, tmp_path / 'hf', 'hf')
  assert f'of {quantisation}' in line
  ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
  ours, theirs = ours.state_dict(), _peer(path).state_dict()
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize('family', ['qwen2', 'smollm2'])
def test_logits_are_those_of_transformers(tmp_path, family):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, family, 'Q4_1')
  seed = seeds.load_seed(path)
  tokens = np.arange(60).reshape(2, 30)
  ours = seed.network.logits(seed.params, {'decoder_input_tokens': tokens})
  with torch.no_grad():
    theirs = _peer(path)(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_seed_says_that_it_was_dequantised(tmp_path):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'smollm2', 'Q4_1')
  seed = seeds.load_seed(path)
  assert seed.note == 'dequantised from 14 tensors of Q4_1, 5 of F32, 1 of Q8_0'
  assert seed.reference['format'] == 'gguf'
  assert seed.reference['path'] == str(path)
  conversion.convert(path, tmp_path / 'hf', 'hf')
  assert seeds.load_seed(tmp_path / 'hf').fingerprint == seed.fingerprint


LINES = [
  *gguf_files.TEXT.splitlines(),
  "Zwölf Bären, 東京 — don't!",
  ' a  b',
  '',
]


@pytest.mark.parametrize('family', FAMILIES)
def test_texts_become_the_tokens_of_transformers(tmp_path, family):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, family)
  conversion.convert(path, tmp_path / 'hf', 'hf')
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path, gguf_file=path.name
  )
  ours = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  seqio_s = tokenizers_vocabulary.TokenizersVocabulary(str(tmp_path / 'hf'))
  for line in LINES:
    line = re.sub(r'\s+(?=\d)', ' ', line)
    wanted = theirs(line).input_ids
    assert ours(line).input_ids == wanted, line
    assert ours.decode(wanted) == theirs.decode(wanted)
    plain = theirs(line, add_special_tokens=False).input_ids
    assert list(seqio_s.encode(line)) == plain, line
  for name in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id'):
    assert getattr(ours, name) == getattr(theirs, name), name
  begins = theirs('a').input_ids[0] == theirs.bos_token_id
  assert begins == (family in ('gemma2', 'gemma3', 'llama3'))
  assert seqio_s.begin_id == (theirs.bos_token_id if begins else None)
  chat = [{'role': 'user', 'content': 'one two'}]
  assert ours.apply_chat_template(chat, tokenize=False) == (
    theirs.apply_chat_template(chat, tokenize=False)
  )


def test_smollm_cuts_numbers_into_digits_before_anything_else(tmp_path):
  # Transformers cuts them as GPT-2 does: the spaces become two tokens, ' ' and
  # ' '. SmolLM's own tokenizer.json and llama.cpp keep them together.
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'smollm2')
  conversion.convert(path, tmp_path / 'hf', 'hf')
  seqio_s = tokenizers_vocabulary.TokenizersVocabulary(str(tmp_path / 'hf'))
  tokens = [seqio_s.tokenizer.id_to_token(i) for i in seqio_s.encode('a  12')]
  assert tokens == ['a', 'ĠĠ', '1', '2']


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path, caplog):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'qwen2', changes={'tokenizer.ggml.pre': 'tekken'})
  conversion.convert(path, tmp_path / 'hf', 'hf')
  assert "tokenizer.ggml.pre is 'tekken'" in caplog.text
  names = {file.name for file in (tmp_path / 'hf').iterdir()}
  assert names == {'config.json', 'model.safetensors'}


@pytest.mark.parametrize(
  ('family', 'changes', 'message'),
  [
    ('llama3', {'general.architecture': 'mamba'}, "the architecture 'mamba'"),
    ('llama3', {'general.architecture': 'gemma'}, "the architecture 'gemma'"),
    ('llama3', {'llama.expert_count': 8}, 'a mixture of experts'),
    ('llama3', {'llama.rope.dimension_count': 8}, 'partial RoPE'),
    ('llama3', {'llama.attention.sliding_window': 8}, 'sliding_window is not'),
    ('llama3', {'llama.rope.freq_base': 7e5}, 'rope_freqs.weight is not that'),
    ('qwen2', {'qwen2.rope.scaling.type': 'yarn'}, "it is 'yarn'"),
    ('qwen2', {'qwen2.block_count': None}, "lacks 'qwen2.block_count'"),
    ('qwen2', {'qwen2.block_count': 3}, 'lacks tensor blk.2.attn_norm.weight'),
    ('qwen2', {'qwen2.block_count': 1}, 'blk.1.attn_k.bias (12 superfluous)'),
    ('qwen2', {'qwen2.feed_forward_length': 96}, 'metadata ask for (96, 32)'),
  ],
)
def test_what_is_not_known_is_refused_by_name(
  tmp_path, family, changes, message
):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, family, changes=changes)
  with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
    seeds.load_seed(path)
  assert '\n' not in str(caught.value)
  assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'smollm2', 'Q4_1')
  content = path.read_bytes()
  for size in [0, 3, 4, 20, 1000, len(content) // 3, len(content) // 2, -100]:
    path.write_bytes(content[:size])
    with pytest.raises(
      errors.UserError, match='truncated or damaged'
    ) as caught:
      seeds.load_seed(path)
    assert '\n' not in str(caught.value)


def test_a_quantisation_that_is_not_known_is_refused(tmp_path):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'smollm2', 'Q4_1')
  content = path.read_bytes()
  name = b'blk.0.ffn_down.weight'
  at = content.index(name) + len(name) + 4 + 16
  assert content[at] == 3  # Q4_1
  for kind, message in [(9, 'quantisation Q8_1'), (99, 'is not a valid GGML')]:
    path.write_bytes(content[:at] + bytes([kind]) + content[at + 1 :])
    with pytest.raises(errors.UserError, match=message) as caught:
      seeds.load_seed(path)
    assert '\n' not in str(caught.value)


def test_there_is_no_such_file(tmp_path):
  with pytest.raises(errors.UserError, match=r'there is no .*x\.gguf'):
    seeds.load_seed(tmp_path / 'x.gguf')


def test_no_number_that_is_not_finite(tmp_path):
  path = tmp_path / 'tiny.gguf'
  gguf_files.write(path, 'qwen2')
  array = parts.flatten(seeds.load_seed(path).params)[
    'decoder/decoder_norm/scale'
  ]
  content = path.read_bytes()
  at = content.index(array.tobytes())
  path.write_bytes(content[:at] + b'\xff' * 4 + content[at + 4 :])
  with pytest.raises(errors.UserError, match='NaN'):
    seeds.load_seed(path)


def test_a_file_is_no_vocabulary(tmp_path):
  with pytest.raises(errors.UserError, match=r'dst_t5x\.convert'):
    vocabulary.chosen(str(tmp_path / 'tiny.gguf'))
