"""Scores decoded predictions with the metrics of tasks, through seqio."""

from collections.abc import Iterable, Mapping
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.engine import sources
from dst_t5x.models import api
from dst_t5x.runtime import processes

PyTree = Any
# The name of a mixture's average among its metrics.
AVERAGE = 'average'


class TaskEvaluator:
  """Scores decoded predictions with the task's own metrics, through seqio.

  Attributes:
    texts: `task/name` -> text of a metric, such as how it was computed, from
      the last call.
  """

  def __init__(
    self,
    task: str,
    split: str,
    lengths: Mapping[str, int],
    network: api.Network,
    predict: sources.Predict,
    output_dir: str | None,
    num_examples: int | None = None,
  ) -> None:
    """Reads the split into memory.

    Args:
      task: a registered task or mixture.
      split: the name of the split.
      lengths: feature -> longest length; longer examples are truncated.
      network: the model, for its feature converter.
      predict: decodes examples with given parameters.
      output_dir: the folder for predictions and metrics as JSON lines, written
        by the first process; None to write nothing.
      num_examples: the number of examples of each task; None for all.
    """
    self._files = (
      object_stores.Mirror(output_dir, '*-metrics.jsonl')
      if output_dir and processes.is_first()
      else None
    )
    self.texts: dict[str, str] = {}
    self._task = task
    self._predict = predict
    self._eos_id = network.eos_id
    self._evaluator = seqio.Evaluator(
      task,
      network.feature_converter(pack=False),
      eval_split=split,
      sequence_length=dict(lengths),
      num_examples=num_examples,
      logger_cls=[seqio.JSONLogger] if self._files else [],
      log_dir=self._files.folder if self._files else None,
      async_compute_metrics=False,
    )

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Returns `task/metric` -> value, in the task's own units.

    Several tasks also have an average, `mixture/average`; see `average`.

    Raises:
      OSError: the predictions cannot be written.
    """
    if not self._evaluator.eval_tasks:
      return {}  # No task has metrics for this split.

    def predict(dataset: Any) -> list[tuple[int, np.ndarray]]:
      found = self._predict(params, dataset.as_numpy_iterator())
      return filled_up(found, self._eos_id)

    try:
      future, _ = self._evaluator.evaluate(
        compute_metrics=True, step=step, predict_fn=predict
      )
    except ValueError as e:
      # seqio raises ValueError for every cause: a full disk, or a task's bug.
      if isinstance(e.__cause__, OSError | tf.errors.OpError):
        raise OSError(str(e.__cause__).splitlines()[0]) from e
      raise
    if self._files:
      self._files.upload()
    scores, self.texts = _split(future.result())
    for name, text in self.texts.items():
      logging.info('%s: %s', name, text)
    results = {
      f'{task}/{name}': value
      for task, metrics in scores.items()
      for name, value in metrics.items()
    }
    if len(scores) > 1:
      results[f'{self._task}/{AVERAGE}'] = average(scores)
    return results


def _split(
  results: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
  """Returns task -> metric -> value, and `task/metric` -> text."""
  scores: dict[str, dict[str, float]] = {}
  texts: dict[str, str] = {}
  for task, metrics in results.items():
    for name, value in metrics.items():
      if isinstance(value, seqio.metrics.Text):
        texts[f'{task}/{name}'] = str(value.textdata)
      else:
        number = float(getattr(value, 'value', value))
        scores.setdefault(task, {})[name] = number
  return scores, texts


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
  """Returns the mean over tasks of the mean over a task's metrics.

  SuperGLUE (Wang et al. 2019, Section 3.1) and the paper (App. G) average in
  this way. All tasks have the same weight, whatever their number of metrics.

  Args:
    scores: task -> metric -> value.
  """
  return float(np.mean([np.mean(list(m.values())) for m in scores.values()]))


def rehearse(
  task: str,
  split: str,
  lengths: Mapping[str, int],
  network: api.Network,
  num_examples: int,
) -> list[str]:
  """Scores a few examples of each task with their targets as predictions.

  Args:
    task: a registered task or mixture.
    split: the name of the split.
    lengths: feature -> longest length.
    network: the model, for its feature converter.
    num_examples: the number of examples of each task.

  Returns:
    The names of the metrics that `TaskEvaluator` returns.

  Raises:
    UserError: a task cannot be scored.
  """

  def predict(
    params: PyTree, examples: Iterable[tuple[int, Mapping[str, Any]]]
  ) -> list[tuple[int, np.ndarray]]:
    del params
    predicted = []
    for index, features in examples:
      targets = network.targets(features)
      # A row may have the inputs, too.
      is_target = np.asarray(targets.weights) > 0
      predicted.append((int(index), np.asarray(targets.tokens)[is_target]))
    return predicted

  try:
    score = TaskEvaluator(
      task, split, lengths, network, predict, None, num_examples
    )
    return list(score(None, step=0))
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f'the {split} split of task {task!r} cannot be scored: '
      f'{first_line(e.__cause__ or e)}'
    ) from e


def filled_up(
  predictions: Iterable[tuple[int, np.ndarray]], eos_id: int
) -> list[tuple[int, np.ndarray]]:
  """Returns (index, int32 [length]): predictions as seqio takes them.

  All are of one length there, and end with the first end token.

  Args:
    predictions: (index, int32 tokens).
    eos_id: the token that ends a sequence.
  """
  found = list(predictions)
  length = max([1, *(len(tokens) for _, tokens in found)])
  return [
    (index, np.pad(tokens, (0, length - len(tokens)), constant_values=eos_id))
    for index, tokens in found
  ]
