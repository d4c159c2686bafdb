"""The real SmolLM2-135M, dequantised, beside Transformers' own reading."""

import os
import pathlib
import re

import gguf_files
import jax
import numpy as np
import pytest

from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.data import tokenizers_vocabulary

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

_VARIABLE = 'DST_SMOLLM2_GGUF'
_PATH = os.environ.get(_VARIABLE, '')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not _PATH, reason=f'{_VARIABLE} names no SmolLM2-135M-Instruct.Q4_1.gguf'
  ),
]
_LINES = [line for line in gguf_files.TEXT.splitlines() if len(line) > 60]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  target = tmp_path_factory.mktemp('smollm2') / 'hf'
  conversion.convert(_PATH, target, 'hf')
  return target


@pytest.fixture(scope='module')
def peer():
  path = pathlib.Path(_PATH)
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  return model.eval(), tokenizer


@pytest.fixture(scope='module')
def logits(folder):
  network = hf_checkpoint.model_of(folder).network
  params = hf_checkpoint.load(folder).params
  compute = jax.jit(network.logits)
  return lambda tokens: np.array(
    compute(params, {'decoder_input_tokens': np.asarray(tokens, np.int32)})
  )


def test_logits_on_real_text_are_those_of_transformers(peer, logits):
  model, tokenizer = peer
  tokens = np.array(tokenizer(gguf_files.TEXT).input_ids[:1024]).reshape(2, -1)
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(logits(tokens), theirs, atol=1e-3)


def test_greedy_continuations_are_those_of_transformers(peer, logits):
  model, tokenizer = peer
  prompts = [tokenizer(line).input_ids[:16] for line in _LINES]
  prompts = torch.tensor([ids for ids in prompts if len(ids) == 16][:20])
  assert prompts.shape == (20, 16)
  with torch.no_grad():
    rows = model.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      do_sample=False,
      max_new_tokens=32,
      min_new_tokens=32,
    ).numpy()
  assert rows.shape == (20, 48)
  scores = logits(rows)
  # `min_new_tokens` keeps the end token away.
  scores[..., model.config.eos_token_id] = -np.inf
  # If each is the likeliest after those before, greedy search gives the same.
  np.testing.assert_array_equal(scores[:, 15:-1].argmax(-1), rows[:, 16:])


def test_texts_become_the_tokens_of_transformers(peer, folder):
  _, theirs = peer
  ours = transformers.AutoTokenizer.from_pretrained(folder)
  vocabulary = tokenizers_vocabulary.TokenizersVocabulary(str(folder))
  for line in gguf_files.TEXT.splitlines():
    # Of spaces before digits, see test_gguf.
    line = re.sub(r'\s+(?=\d)', ' ', line)
    wanted = theirs(line).input_ids
    assert ours(line).input_ids == wanted == list(vocabulary.encode(line))
    assert ours.decode(wanted) == line == vocabulary.decode(wanted)
  chat = [{'role': 'user', 'content': 'Who are you?'}]
  assert ours.apply_chat_template(chat, tokenize=False) == (
    theirs.apply_chat_template(chat, tokenize=False)
  )
