"""Evaluates one checkpoint."""

import os

from absl import logging
from etils import epath

from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import values
from dst_t5x.core import whole_files
from dst_t5x.core.errors import writing
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.runtime import processes


def evaluate(
  network: api.Network,
  checkpoint_path: values.Path,
  output_dir: values.Path,
  evaluation: evaluation_lib.Evaluation,
  partitioner: partitioning.Partitioner,
  checkpoint_step: values.Count | None = None,
  initial_checkpoint_path: values.Path | None = None,
) -> dict[str, float]:
  """Evaluates a checkpoint once.

  Args:
    network: the model.
    checkpoint_path: a run folder, or a checkpoint in any format of `seeds`.
    output_dir: the folder for `results.json` and the predictions. The first
      process writes them.
    evaluation: the settings of the evaluation.
    partitioner: the mesh and its shardings.
    checkpoint_step: the checkpoint of a run folder; the last by default.
    initial_checkpoint_path: the path of the run's seed, if it was moved.

  Returns:
    The metrics, by name.

  Raises:
    UserError: the checkpoint, the task or the data cannot be read, or the
      folder cannot be written to.
  """
  evaluation.check(network)
  folder = epath.Path(output_dir)
  object_stores.check_writable('EVAL_OUTPUT_DIR', folder)
  partitioner = parameters.choose_mesh(
    network, partitioner, partitioning.IN_EVALUATION
  )
  with partitioner.activate():
    loaded = parameters.load(
      network,
      partitioner,
      checkpoint_path,
      checkpoint_step,
      initial_checkpoint_path,
    )
    evaluate_params = evaluation.prepare(
      loaded.network, partitioner, output_dir
    )
    with writing(f'EVAL_OUTPUT_DIR {folder}'):
      results = evaluate_params(loaded.params, loaded.step)
  for name, value in results.items():
    logging.info('%s: %.6g', name, value)
  report: dict[str, object] = {
    'checkpoint': os.fspath(checkpoint_path),
    'step': loaded.step,
    'split': evaluation.split,
    **results,
    **evaluate_params.texts,
  }
  if processes.is_first():
    with writing(f'EVAL_OUTPUT_DIR {folder}'):
      text = json_text.dumps(report, indent=2) + '\n'
      whole_files.write_text(folder / 'results.json', text)
  return results
