"""The identity of a run in `run.json`, and the changes that it detects."""

import json
import re
import shutil

import commands
from gin import config as gin_config
import pytest

from dst_t5x.checkpoints import formats
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.config import check
from dst_t5x.config import gin_files
from dst_t5x.config import gin_names
from dst_t5x.core.errors import UserError
from dst_t5x.method import family
from dst_t5x.runs import identity
from dst_t5x.runs import training

METHODS = [
  name.rpartition('/')[2].removesuffix('.gin')
  for name in gin_files.shipped()
  if name.startswith('gin/methods/')
]


# Methods whose budget can shrink.
_RESELECT = ('gasdu', 'nano_adam', 'lift', 'spiel')
_DST = ('dst', 'dst_no_churn', 'random')
# Method's file -> its name in `run.json`, where it is another.
_NAMES = {'dst_no_churn': 'dst', 'rslora': 'lora'}


def _parse(method, *arguments):
  binaries.parse(
    [*commands.finetune('/seed', method), '--gin.MODEL_DIR=/run', *arguments],
    training.train,
  )


def _texts(value):
  """Yields all keys and texts of a JSON value."""
  if isinstance(value, dict):
    for key, item in value.items():
      yield key
      yield from _texts(item)
  elif isinstance(value, list):
    for item in value:
      yield from _texts(item)
  elif isinstance(value, str):
    yield value


@pytest.mark.parametrize('method', METHODS)
def test_no_module_is_named(method):
  _parse(method, '--gin_file=gin/tasks/jsonl.gin')
  said = identity.of(training.train).settings
  assert said['method']['method'] == _NAMES.get(method, method)
  assert said['model']['id'] == 't5_1_1'
  assert said['task'] == 'jsonl'
  modules = {
    part
    for selector, _ in gin_config._REGISTRY.items()
    for part in [gin_config._REGISTRY[selector].wrapped.__module__]
  }
  texts = list(_texts(said))
  assert len(texts) > 40
  for text in texts:
    assert not re.search(r'\bdst_t5x\b|@', text)
    assert not any(text.startswith(f'{module}.') for module in modules), text


# Another value that makes sense, where that is not plain from the first one.
_OTHERS = {
  'adapter': None,
  'decay': 'cosine',
  'distance': 'relative',
  'end': 'smallest',
  'epsilon_schedule': 'linear',
  'exclude': ['token_embedder/.*'],
  'feature_lengths': {'inputs': 8, 'targets': 8},
  'initialization': 'uniform',
  'labels': ['yes'],
  'normalization': None,
  'normalize_over': 'per_module',
  'silos': 'none',
  'threshold': 'sort',
  'train_file': '/train.jsonl',
  'trained': ['.*/scale'],
}


def _other(name, value):
  if name in _OTHERS:
    return _OTHERS[name]
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  if isinstance(value, float):
    return value / 2 + 0.1
  if isinstance(value, list | tuple):
    return [*value, 'more']
  return f'{value}_other'


_FREE = (
  'runs.plan.Plan',
  'engine.evaluation.Evaluation',
  'engine.held_out.examples',
  'tasks.text.held_out',
  'engine.partitioning.Partitioner',
)


@pytest.mark.parametrize('method', METHODS)
def test_every_setting_is_noticed(method):
  """No setting that gin binds and a step depends on is left out."""
  flags = commands.flags(EPSILON_START=1.0, EPSILON_STEPS=9)
  _parse(
    method,
    '--gin_file=gin/tasks/jsonl.gin',
    *(flags if method in (*_DST, *_RESELECT) else []),
  )
  before = identity.of(training.train)
  reach = check.Reach([gin_names.reference_to(training.train)])
  tried = set()
  for key, value in reach.bindings.items():
    resolved = check._resolved(value, reach)
    if key.is_macro or '@' in repr(resolved):
      continue
    old = gin_config._CONFIG[key.scope, key.selector][key.parameter]
    other = _other(key.parameter, resolved)
    if resolved == other:
      continue
    gin_config.bind_parameter(tuple(key), other)
    try:
      noticed = identity.of(training.train).settings != before.settings
    finally:
      gin_config._CONFIG[key.scope, key.selector][key.parameter] = old
    name = f'{key.selector}.{key.parameter}'
    may_change = key.selector.endswith(
      tuple(free.rpartition('.')[2] for free in _FREE)
    ) or key.parameter in (
      *('model_dir', 'initial_checkpoint_path'),
      # They mean nothing while EPSILON_SCHEDULE is 'constant'.
      *('epsilon_start', 'epsilon_steps'),
      'seed_dtype',  # It changes no result.
    )
    assert noticed != may_change, name
    tried.add(key.parameter)
  assert {'batch_size', 'base', 'z_loss', 'metrics', 'name', 'emb_dim'} <= tried
  assert ('epsilon' in tried) == (method in (*_DST, *family.METHODS))
  assert identity.of(training.train) == before


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('MICROBATCHES=2', 'trainer.microbatches = 1, not 2'),
    (
      'PROJECTION=@projection.NoProjection()',
      "method.method = 'dst', not 'full'",
    ),
    ('network.T5Config.remat=True', 'model.config.remat = False, not True'),
    ("VOCABULARY='bytes'", "other.vocabulary.name = None, not 'bytes'"),
    ('LEARNING_RATE=1', 'optimizer.learning_rate.base = 0.01, not 1'),
    ('SILOS=[(".*", "all")]', 'method.silos = '),
    (
      'optimizers.adafactor.learning_rate=@toy_task.spiked()',
      "optimizer.learning_rate.id = 'schedule', not 'spiked'",
    ),
  ],
)
def test_another_setting_is_told(flag, message, tmp_path):
  _parse('dst')
  _write(tmp_path, identity.of(training.train).settings)
  _parse('dst', f'--gin.{flag}')
  with pytest.raises(UserError) as error:
    identity.check(tmp_path, identity.of(training.train))
  assert f'the run in MODEL_DIR {tmp_path} has {message}' in str(error.value)
  assert 'choose another MODEL_DIR' in str(error.value)
  assert '\n' not in str(error.value)


def _write(folder, settings, **more):
  content = {'format': 1, 'seed': None, 'rows': {}, **settings, **more}
  (folder / 'run.json').write_text(json.dumps(content))


def test_defaults_are_part_of_a_run(tmp_path):
  """A later version can change defaults, or add settings."""
  _parse('dst')
  ours = identity.of(training.train)
  said = json.loads(json.dumps(ours.settings))
  assert said['method'].pop('delta') == 2.0  # As if it had not been there yet.
  del said['model']['config']['scan_layers']
  _write(tmp_path, said)
  identity.check(tmp_path, ours)
  said['method']['iterations'] = 9  # As if this had been the default.
  _write(tmp_path, said)
  with pytest.raises(UserError, match=r'has method\.iterations = 9, not 10'):
    identity.check(tmp_path, ours)
  said['method']['iterations'] = 10
  del said['method']['epsilon']  # Which somebody has set.
  _write(tmp_path, said)
  with pytest.raises(UserError, match=r'has method\.epsilon = None, not 0'):
    identity.check(tmp_path, ours)


def test_a_lora_from_before_rank_stabilization_goes_on(tmp_path):
  _parse('lora')
  ours = identity.of(training.train)
  said = json.loads(json.dumps(ours.settings))
  assert said['method'].pop('rank_stabilized') is False
  _write(tmp_path, said)
  identity.check(tmp_path, ours)
  _parse('rslora')
  with pytest.raises(UserError, match=r'method\.rank_stabilized = None, not T'):
    identity.check(tmp_path, identity.of(training.train))


_MODULE = """
import dataclasses

import jax
import jax.numpy as jnp

from dst_t5x.method import api


@dataclasses.dataclass(frozen=True)
class Columns(api.Projection):
  count: int = 2

  def free(self, shapes):
    return sum(
      x.size // x.shape[-1] * min(self.count, x.shape[-1])
      for x in jax.tree.leaves(shapes)
    )

  def apply(self, new_params, seed_params, state):
    def select(new, seed):
      return jnp.where(jnp.arange(new.shape[-1]) < self.count, new, seed)
    return jax.tree.map(select, new_params, seed_params), state

"""
_GIN = """
from __gin__ import dynamic_registration
from dst_t5x.engine import trainer
import {module}

LEARNING_RATE = 0.01
COLUMNS = 3
PROJECTION = @{module}.Columns()
{module}.Columns.count = %COLUMNS
"""


def test_a_module_may_move(toy_seed, tmp_path, monkeypatch):
  """The run continues to the same bits: its record names no module."""
  monkeypatch.syspath_prepend(tmp_path)

  def train(module, folder, steps, columns=3):
    (tmp_path / f'{module}.py').write_text(_MODULE)
    (tmp_path / f'{module}.gin').write_text(_GIN.format(module=module))
    arguments = commands.finetune(toy_seed, 'full')
    arguments[1] = f'--gin_file={tmp_path / f"{module}.gin"}'
    flags = commands.flags(
      MODEL_DIR=folder, TRAIN_STEPS=steps, EVAL_EXAMPLES=4, COLUMNS=columns
    )
    commands.call('train', *arguments, *flags)

  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  train('columns_here', whole, 6)
  train('columns_here', moved, 3)
  (tmp_path / 'columns_here.py').unlink()
  train('columns_there', moved, 6)
  assert commands.fingerprint(whole) == commands.fingerprint(moved)
  text = (moved / 'run.json').read_text()
  assert 'columns_' not in text
  assert json.loads(text)['method'] == {'method': 'columns', 'count': 3}
  with pytest.raises(UserError, match=r'has method\.count = 3, not 4'):
    train('columns_there', moved, 7, columns=4)


def _set_format(file, number):
  content = json.loads(file.read_text())
  assert content['format'] == 1
  file.write_text(json.dumps(content | {'format': number}))


def test_a_newer_format_is_refused(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(toy_seed, folder)
  about = max(folder.glob('checkpoints/*/about/metadata'))
  step = int(about.parent.parent.name)
  for file in (folder / 'run.json', about):
    _set_format(file, 2)
    refusals = [lambda: identity.records(folder)]
    if file == about:
      refusals.append(lambda: seeds.load_run(folder, step))
    for refusal in refusals:
      with pytest.raises(UserError, match='a newer dst_t5x wrote it') as error:
        refusal()
      assert str(folder) in str(error.value)
      assert '\n' not in str(error.value)
      assert 'has format 2' in str(error.value)
    file.write_text(json.dumps(json.loads(file.read_text()) | {'format': 1}))
  assert run_folder.read_run_file(folder)['format'] == formats.FORMAT
