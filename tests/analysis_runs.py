"""Folders as runs leave them, made by hand: for tests of the analysis."""

import json

import numpy as np

from dst_t5x import subsets as subset
from dst_t5x.method import projection
from dst_t5x.subsets import definition

FINGERPRINT = 'ab' * 32
PARAMETERS = 6000
SHAPES = {
  'encoder/layers_0/attention/query/kernel': (40, 25),
  'encoder/layers_0/mlp/wi/kernel': (50, 40),
  'encoder/layers_0/pre_mlp_layer_norm/scale': (200,),
  'decoder/layers_0/self_attention/query/kernel': (20, 40),
  'decoder/logits_dense/kernel': (40, 25),
  'token_embedder/embedding': (40, 25),
}
TENSORS = {
  path: definition.TensorType(shape, np.dtype(np.float32))
  for path, shape in SHAPES.items()
}


def record(task, method, learning_rate, random_seed, **settings):
  """Returns what `run.json` says of a run."""
  if method in ('dst', 'random'):
    if method == 'random':
      settings = settings | {'distance': 'random', 'random_seed': random_seed}
    said = projection.SubsetProjection(
      **{'epsilon': 1e-4, **settings}
    ).settings()
  else:
    said = {'method': method, **_SETTINGS.get(method, {}), **settings}
  return {
    'format': 1,
    'task': task,
    'model': {'id': 't5_1_1'},
    'method': said,
    'optimizer': {
      'id': 'adafactor',
      'learning_rate': {'id': 'schedule', 'base': learning_rate},
    },
    'random_seed': random_seed,
    'from_scratch': False,
  }


_SETTINGS = {
  'lora': {'rank': 8, 'targets': '.*attention/(query|value)'},
  'prompt': {'length': 10},
}


def random_subset(number, random_seed):
  """Returns a subset of so many of the model's parameters."""
  generator = np.random.default_rng(random_seed)
  chosen = np.sort(generator.choice(PARAMETERS, number, replace=False))
  positions, values, start = {}, {}, 0
  for path, tensor in sorted(TENSORS.items()):
    size = int(np.prod(tensor.shape))
    own = chosen[(chosen >= start) & (chosen < start + size)] - start
    if len(own):
      positions[path] = own
      values[path] = np.ones(len(own), np.float32)
    start += size
  return subset.Subset(TENSORS, positions, values, FINGERPRINT)


def write(
  folder,
  score,
  task='sort',
  method='dst',
  learning_rate=0.1,
  random_seed=0,
  free=None,
  fingerprint=FINGERPRINT,
  steps=20,
  test=None,
  subsets=(),
  parameters=PARAMETERS,
  forgetting=None,
  **settings,
):
  """Writes a finished run; returns its folder.

  Args:
    folder: MODEL_DIR.
    score: `<task>/exact_match` on the development split.
    task: what it trains on.
    method: which method.
    learning_rate: its learning rate.
    random_seed: its random seed.
    free: how many parameters it trains.
    fingerprint: its seed's.
    steps: its steps.
    test: the score on the test split, if it was evaluated.
    subsets: of its checkpoints, the last one too; one a step of ten.
    parameters: of the model.
    forgetting: its forgetting, if there is held-out text.
    **settings: of its method.
  """
  folder.mkdir(parents=True)
  if free is None:
    epsilon = settings.get('epsilon')
    free = round(epsilon * parameters) if epsilon else parameters
  about = record(task, method, learning_rate, random_seed, **settings)
  seed = {'fingerprint': fingerprint, 'path': '/seeds/small'}
  _json(folder / 'run.json', {**about, 'seed': seed, 'version': '0'})
  (folder / 'config.gin').write_text(
    f"# Macros:\nEVAL_SPLIT = 'validation'\nTRAIN_STEPS = {steps}\n"
  )
  results = {'step': steps, 'eval/loss': 1.0, f'{task}/exact_match': score}
  if forgetting is not None:
    results |= {
      'held_out/loss': 2.0 + forgetting,
      'held_out/forgetting': forgetting,
    }
  _json(
    folder / 'report.json',
    {
      'step': steps,
      'parameters': parameters,
      'free': free,
      'fraction': free / parameters,
      'results': results,
    },
  )
  rates = [1.0, *(5.0 + 0.1 * random_seed + 0.01 * i for i in range(3))]
  rows = [
    {'step': i + 1, 'speed/steps_per_second': rate, 'train/loss': 2.0 - 0.1 * i}
    for i, rate in enumerate(rates)
  ]
  rows.append(results)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)
  if test is not None:
    (folder / 'test').mkdir()
    _json(
      folder / 'test' / 'results.json',
      {'step': steps, 'split': 'test', f'{task}/exact_match': test},
    )
  for i, found in enumerate(subsets):
    (folder / 'subsets').mkdir(exist_ok=True)
    subset.save(folder / 'subsets' / f'{10 * (i + 1):06}.dst', found, {})
  if subsets:
    subset.save(folder / 'last.dst', subsets[-1], {})
  return folder


def write_zero_shot(folder, score, task='sort', split='validation'):
  """Writes an evaluation of the seed; returns its folder."""
  folder.mkdir(parents=True)
  _json(
    folder / 'results.json',
    {
      'checkpoint': '/seeds/small',
      'step': 0,
      'split': split,
      'eval/loss': 3.0,
      f'{task}/exact_match': score,
    },
  )
  return folder


def _json(path, content):
  path.write_text(json.dumps(content, indent=2) + '\n')
