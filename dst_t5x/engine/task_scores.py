"""Scores decoded predictions with the metrics of tasks, through seqio."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.models import api
from dst_t5x.runtime import processes

PyTree = Any
# The name of a mixture's average among its metrics.
AVERAGE = 'average'
# (params, an (index, features) for each example) -> an (index, tokens) for each
Predict = Callable[
  [PyTree, Iterable[tuple[int, Mapping[str, Any]]]],
  list[tuple[int, np.ndarray]],
]


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
    predict: Predict,
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
      return self._predict(params, dataset.as_numpy_iterator())

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
      tokens = np.asarray(targets.tokens)
      row = filled_up(tokens[is_target], len(tokens), network.eos_id)
      predicted.append((int(index), row))
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


def filled_up(tokens: np.ndarray, length: int, eos_id: int) -> np.ndarray:
  """Returns int32 [length]: a prediction as seqio takes it.

  All are of one length there, and end with the first end token.

  Args:
    tokens: int32, at most `length` of them.
    length: of the row.
    eos_id: the token that ends a sequence.
  """
  row = np.full(length, eos_id, np.int32)
  row[: len(tokens)] = tokens
  return row
