"""Evaluates: `python -m dst_t5x.eval --gin_file=… --gin.NAME=VALUE`.

Takes a checkpoint of a run, or a seed as it is, which is the zero-shot score.
"""

import json
import os

from absl import logging
from etils import epath
from flax import linen as nn

from dst_t5x import checkpoints
from dst_t5x import evaluation as evaluation_lib
from dst_t5x import parameters
from dst_t5x import partitioning
from dst_t5x import seeds
from dst_t5x.errors import UserError, writing


def load(path: str, step: int | None = None) -> tuple[parameters.PyTree, int]:
  """Returns parameters and step of a run's checkpoint, or of a seed.

  Args:
    path: a run folder, or a checkpoint in any format of `seeds`.
    step: which checkpoint of a run; the last by default.

  Raises:
    UserError: there is no such checkpoint.
  """
  if step is None:
    seed = seeds.load_seed(path)
    return seed.params, seed.step or 0
  if not checkpoints.is_run(path):
    raise UserError(f'CHECKPOINT_STEP needs a run folder; {path} is none')
  loaded = checkpoints.load_run(path, step)
  return loaded.params, loaded.step


def evaluate(
  network: nn.Module,
  checkpoint_path: str,
  output_dir: str,
  evaluation: evaluation_lib.Evaluation,
  partitioner: partitioning.Partitioner,
  checkpoint_step: int | None = None,
) -> dict[str, float]:
  """Evaluates a checkpoint once.

  Args:
    network: the model.
    checkpoint_path: a run folder, or a checkpoint in any format of `seeds`.
    output_dir: where `results.json` and the predictions go.
    evaluation: what is evaluated.
    partitioner: how devices share the work.
    checkpoint_step: which checkpoint of a run; the last by default.

  Returns:
    The metrics.

  Raises:
    UserError: the checkpoint, the task or the data are not there, or the
      folder cannot be written to.
  """
  evaluation.check(partitioner)
  folder = epath.Path(output_dir)
  with writing(f'EVAL_OUTPUT_DIR {folder}'):
    folder.mkdir(parents=True, exist_ok=True)
  with partitioner.activate():
    space = parameters.ParameterSpace(network, partitioner)
    host_params, step = load(checkpoint_path, checkpoint_step)
    params = space.to_devices(host_params)
    results = evaluation.prepare(network, partitioner, output_dir)(params, step)
  for name, value in results.items():
    logging.info('%s: %.6g', name, value)
  report = {
    'checkpoint': os.fspath(checkpoint_path),
    'step': step,
    'split': evaluation.split,
  } | results
  with writing(f'EVAL_OUTPUT_DIR {folder}'):
    (folder / 'results.json').write_text(json.dumps(report, indent=2) + '\n')
  return results


if __name__ == '__main__':
  from dst_t5x import config
  from dst_t5x import eval as this

  config.run(this.evaluate)
