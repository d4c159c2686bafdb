"""`python -m dst_t5x.subset card`: folders for the Hub, and what they say."""

import os
import re
import subprocess
import sys

import hub_cache
import huggingface_hub
import pytest
import subsets as subset_tools
import torch_models
import yaml

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import subset_command
from dst_t5x.subsets import fingerprint

_BASE = 'some-lab/base'
_REPOSITORY = 'some-lab/tuned'
_ABOUT = {
  'seed': {'path': '/home/someone/secret/seed', 'name': 'secret/seed'},
  'task': 'gsm8k',
  'step': 40,
  'epsilon': 1e-3,
  'silos': 'per_module',
  'scores': {
    **{'gsm8k/exact_match': 61.25, 'gsm8k/loss': 0.5, 'eval/loss': 1.5},
    **{'step': 40, 'gsm8k/none': None, 'gsm8k/flag': True},
  },
}


def _run(capsys, *arguments):
  """Runs the command; returns exit status, output and errors."""
  status = subset_command.main(['card', *map(str, arguments)])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def _metadata(folder):
  """Returns the parsed metadata of a card."""
  text = (folder / 'README.md').read_text()
  return yaml.safe_load(re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)[1])


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Returns a folder with `a.dst`, `b.dst`, and `other.dst` of another seed."""
  root = tmp_path_factory.mktemp('files')
  seed = torch_models.network_of('llama3')[1]
  other = torch_models.network_of('qwen2')[1]
  for i, (name, params) in enumerate(
    {'a': seed, 'b': seed, 'other': other}.items()
  ):
    subset, _ = torch_models.subset_of(params, 0.01, i)
    subsets.save(root / f'{name}.dst', subset, _ABOUT)
  return root


def test_what_the_card_says(capsys, files, tmp_path):
  status, out, _ = _run(
    capsys, files / 'a.dst', '--output', tmp_path / 'card',
    f'--base-model={_BASE}@v1', f'--repository={_REPOSITORY}',
    '--license=apache-2.0', '--dataset=openai/gsm8k',
  )  # fmt: skip
  assert status == 0
  assert f'hf upload {_REPOSITORY} {tmp_path}/card' in out
  assert 'does not say' not in out
  subset, _ = subsets.load(files / 'a.dst')
  found, about = subsets.load(tmp_path / 'card' / 'a.dst')
  subset_tools.assert_equal(found, subset)
  assert about['seed'] == {
    'fingerprint': subset.fingerprint,
    'format': 'hf',
    'name': _BASE,
    'path': f'hf://{_BASE}@v1',
  }
  metadata = _metadata(tmp_path / 'card')
  (index,) = metadata.pop('model-index')
  assert metadata == {
    'base_model': _BASE,
    'base_model_relation': 'adapter',
    'library_name': 'dst_t5x',
    'license': 'apache-2.0',
    'pipeline_tag': 'text-generation',
    'tags': ['dynamic-subset-tuning', 'sparse-fine-tuning', 'dst'],
    'datasets': ['openai/gsm8k'],
    'metrics': ['exact_match', 'loss'],
  }
  (result,) = index['results']
  assert index['name'] == 'tuned'
  assert result['dataset'] == {'type': 'openai/gsm8k', 'name': 'gsm8k'}
  assert {m['type']: m['value'] for m in result['metrics']} == {
    'exact_match': 61.25,
    'loss': 0.5,
  }
  # As the Hub's own library reads it.
  card = huggingface_hub.ModelCard.load(tmp_path / 'card' / 'README.md')
  assert card.data.base_model == _BASE
  assert len(card.data.eval_results) == 2
  text = card.text
  size = sum(tensor.size for tensor in subset.tensors.values())
  num_bytes = (tmp_path / 'card' / 'a.dst').stat().st_size
  share = f'{100 * subset.size / size:.3g} %'
  row = f'| `a.dst` | `gsm8k` | `40` | {subset.size:,} of {size:,} | {share} |'
  assert f'{row} {num_bytes:,} |' in text
  for said in (
    f'`{subset.fingerprint}`',
    'epsilon `0.001`, silos `per_module`',
    '| `a.dst` | `eval/loss` | 1.5 |',
    f'--seed=hf://{_BASE}@v1 --subsets=hf://{_REPOSITORY}',
  ):
    assert said in text


def test_what_nobody_states_is_not_invented(capsys, files, tmp_path):
  status, out, _ = _run(
    capsys, files / 'a.dst', files / 'b.dst', '--output', tmp_path / 'card'
  )
  assert status == 0
  assert 'does not say: --base-model, --repository, --license' in out
  metadata = _metadata(tmp_path / 'card')
  for key in ('base_model', 'base_model_relation', 'license', 'datasets'):
    assert key not in metadata
  (index,) = metadata['model-index']
  names = [m['name'] for r in index['results'] for m in r['metrics']]
  assert 'exact_match (a.dst)' in names
  assert 'exact_match (b.dst)' in names
  text = (tmp_path / 'card' / 'README.md').read_text()
  assert '**its name on the Hub is not stated**' in text
  assert 'License: **not stated**' in text
  for file in (tmp_path / 'card').iterdir():
    assert b'/home/someone' not in file.read_bytes()
  about = subsets.load(tmp_path / 'card' / 'b.dst')[1]
  assert about == {
    **subsets.load(files / 'b.dst')[1],
    'seed': {k: v for k, v in about['seed'].items() if k != 'path'},
  }


def test_a_base_that_the_file_names(capsys, files, tmp_path):
  subset, about = subsets.load(files / 'a.dst')
  about['seed']['path'] = f'hf://{_BASE}@{hub_cache.COMMIT}'
  subsets.save(tmp_path / 'a.dst', subset, about)
  _run(capsys, tmp_path / 'a.dst', '--output', tmp_path / 'card')
  assert _metadata(tmp_path / 'card')['base_model'] == _BASE
  found = subsets.load(tmp_path / 'card' / 'a.dst')[1]
  assert found['seed']['path'] == about['seed']['path']
  text = (tmp_path / 'card' / 'README.md').read_text()
  assert f"revision='{hub_cache.COMMIT}'" in text


def test_metadata_are_no_markup(capsys, files, tmp_path):
  subset, _ = subsets.load(files / 'a.dst')
  odd = '`](javascript:x) | <script> {{ 7 * 7 }} {% raw %}'
  about = {
    **_ABOUT,
    'task': odd,
    'silos': [odd],
    'distance': 'two\n---\nlines',
    'scores': {f'{odd}/x: {{a}}': 1, 'a/b\n': 2, 'c/d': [1]},
  }
  subsets.save(tmp_path / 'odd.dst', subset, about)
  status, _, _ = _run(
    capsys, tmp_path / 'odd.dst', '--output', tmp_path / 'card'
  )
  assert status == 0
  text = (tmp_path / 'card' / 'README.md').read_text()
  body = text.partition('\n---\n')[2]
  outside = re.sub(r'`[^`\n]*`', '', body)
  for mark in ('javascript', 'script>', '{{', '{%', 'two'):
    assert mark not in outside
  _metadata(tmp_path / 'card')


def test_mistakes(capsys, files, tmp_path):
  cut = tmp_path / 'cut.dst'
  cut.write_bytes((files / 'a.dst').read_bytes()[:-1])
  (tmp_path / 'again').mkdir()
  same = tmp_path / 'again' / 'a.dst'
  same.write_bytes((files / 'b.dst').read_bytes())
  odd = tmp_path / 'é [x].dst'
  odd.write_bytes((files / 'b.dst').read_bytes())
  taken = tmp_path / 'taken'
  taken.mkdir()
  good, output = files / 'a.dst', tmp_path / 'card'
  for arguments, message in (
    ([cut], 'damaged or cut short'),
    ([files / 'missing.dst'], 'No such file'),
    ([good, same], r'two files are called a\.dst'),
    ([good, files / 'other.dst'], r'a\.dst and .*other\.dst: '),
    ([odd], 'cannot be named on the Hub'),
    ([good, '--base-model=base'], '--base-model .* is no repository'),
    ([good, '--base-model=a/b/c.dst'], '--base-model .* is no repository'),
    ([good, '--base-model=../b'], '--base-model .* is no repository'),
    ([good, '--repository=a/b@v1'], 'takes no revision'),
    ([good, '--license=Apache 2'], '--license .* apache-2.0'),
    ([good, '--dataset=a b'], '--dataset .* openai/gsm8k'),
  ):
    status, out, err = _run(capsys, *arguments, '--output', output)
    assert (status, out) == (1, '')
    assert re.match(f'error: .*{message}', err), err
    assert err.count('\n') == 1
    assert not output.exists()
  status, _, err = _run(capsys, good, '--output', taken)
  assert status == 1
  assert 'exists already' in err
  assert not list(taken.iterdir())
  left = {'cut.dst', 'again', 'é [x].dst', 'taken'}
  assert {path.name for path in tmp_path.iterdir()} == left


def _blocks(folder, language):
  text = (folder / 'README.md').read_text()
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


_AFTER = {
  'torch': """
import sys
from safetensors import torch as safetensors_torch
tuned = safetensors_torch.load_file(sys.argv[1])
held = model.state_dict()
assert tuned.keys() <= held.keys()
assert all(torch.equal(held[name], tensor) for name, tensor in tuned.items())
""",
  'jax': """
import sys
from dst_t5x.subsets import fingerprint
assert fingerprint.fingerprint(params) == sys.argv[2]
""",
}


@pytest.mark.parametrize('family', ['t5', 'llama3'])
@pytest.mark.parametrize('is_on_hub', [True, False])
def test_the_lines_of_the_card_run(
  capsys, tmp_path, repository, family, is_on_hub
):
  """Each in a process of its own, with nothing but the Hub's cache."""
  cache = tmp_path / 'home' / 'hub'
  network, params = torch_models.save(
    hub_cache.repository(cache, _BASE), family
  )
  subset, tuned = torch_models.subset_of(params)
  hf_checkpoint.save(tmp_path / 'tuned', tuned, network)
  subsets.save(tmp_path / 'a.dst', subset, _ABOUT)
  card = tmp_path / 'card'
  if is_on_hub:
    card = hub_cache.repository(cache, _REPOSITORY)
  options = [f'--repository={_REPOSITORY}'] if is_on_hub else []
  status, _, _ = _run(
    capsys, tmp_path / 'a.dst', '--output', card, f'--base-model={_BASE}',
    *options,
  )  # fmt: skip
  assert status == 0
  torch_lines, jax_lines = _blocks(card, 'python')
  for lines in (torch_lines, jax_lines):
    assert lines.partition('\n\n')[2].count('\n') == 3
  environment = {
    **os.environ,
    'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_OFFLINE': '1',
    'PYTHONPATH': str(repository),
  }
  weights = tmp_path / 'tuned' / 'model.safetensors'
  for lines, after in (
    (f'import torch\n{torch_lines}', _AFTER['torch']),
    (jax_lines, _AFTER['jax']),
  ):
    done = subprocess.run(
      [sys.executable, '-c', lines + after, str(weights),
       fingerprint.fingerprint(tuned)],
      cwd=tmp_path if is_on_hub else card,
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
