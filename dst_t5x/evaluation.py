"""Evaluation: teacher-forced loss, and metrics over decoded predictions.

With several processes each reads all examples, decodes its devices' share of
every batch, and has all predictions in the end: every example counts once,
however many processes, devices, or rows a batch there are.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import time
from typing import Any

from dst_t5x import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
from flax import linen as nn
import jax
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x import adapters
from dst_t5x import data
from dst_t5x import losses
from dst_t5x import object_stores
from dst_t5x import partitioning
from dst_t5x import processes
from dst_t5x import task_checks
from dst_t5x import task_examples
from dst_t5x import trainer as trainer_lib
from dst_t5x import values
from dst_t5x.errors import check_positive
from dst_t5x.tasks import vocabulary

PyTree = Any
# Name of a mixture's one number, among its metrics.
AVERAGE = 'average'
# (network, params, encoder_input_tokens, max_decode_length) -> tokens, scores
Decoder = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass
class Predictor:
  """Decodes the examples of a dataset, in batches of one shape.

  Attributes:
    network: the model.
    decoder: greedy or beam search.
    batch_size: examples that are decoded at once, or a few more: as many as
      devices can share evenly.
    max_decode_length: tokens that are decoded at most.
    partitioner: how devices share the work.
  """

  network: nn.Module
  decoder: Decoder
  batch_size: int
  max_decode_length: int
  partitioner: partitioning.Partitioner

  def __post_init__(self) -> None:
    self.batch_size = self.partitioner.round_up(self.batch_size)
    self._decode = jax.jit(
      _decode,
      static_argnames=('decoder', 'network', 'max_decode_length'),
      # Every process scores all predictions.
      out_shardings=self.partitioner.replicated,
    )
    self.tokens = 0
    self.seconds = 0.0

  def __call__(
    self, params: PyTree, examples: Iterable[tuple[int, Mapping[str, Any]]]
  ) -> list[tuple[int, np.ndarray]]:
    """Returns (index, tokens) of every example, each exactly once.

    Args:
      params: the model's.
      examples: (index, features), as seqio.Evaluator gives them.
    """
    start = time.perf_counter()
    results: list[tuple[int, np.ndarray]] = []
    for indices, inputs in self._batches(examples):
      batch = self.partitioner.place_batch({'encoder_input_tokens': inputs})
      tokens, _ = self._decode(
        self.decoder,
        self.network,
        params,
        batch['encoder_input_tokens'],
        self.max_decode_length,
      )
      tokens = np.asarray(tokens)[: len(indices)]
      self.tokens += int(np.count_nonzero(tokens))
      results.extend(zip(indices, tokens, strict=True))
    self.seconds += time.perf_counter() - start
    return results

  def _batches(
    self, examples: Iterable[tuple[int, Mapping[str, Any]]]
  ) -> Iterable[tuple[list[int], np.ndarray]]:
    indices: list[int] = []
    inputs: list[np.ndarray] = []
    for index, features in examples:
      indices.append(int(index))
      inputs.append(np.asarray(features['encoder_input_tokens']))
      if len(indices) == self.batch_size:
        yield indices, np.stack(inputs)
        indices, inputs = [], []
    if indices:
      # The last batch is padded to the shape that is compiled already.
      missing = self.batch_size - len(indices)
      yield indices, np.stack([*inputs, *[np.zeros_like(inputs[0])] * missing])


def _decode(
  decoder: Decoder,
  network: nn.Module,
  params: PyTree,
  tokens: jax.Array,
  max_decode_length: int,
) -> tuple[jax.Array, jax.Array]:
  """Calls a decoder; one function, so that equal ones are compiled once."""
  return decoder(network, params, tokens, max_decode_length)


class TaskEvaluator:
  """Scores decoded predictions with the task's own metrics, through seqio.

  Attributes:
    texts: `task/name` -> what metrics said in words the last time, such as how
      they were computed.
  """

  def __init__(
    self,
    task: str,
    split: str,
    lengths: Mapping[str, int],
    predictor: Predictor,
    output_dir: str,
    num_examples: int | None = None,
  ) -> None:
    """Reads the split once and keeps it.

    Args:
      task: a registered task or mixture.
      split: which split.
      lengths: feature -> longest length, longer ones are cut.
      predictor: decodes.
      output_dir: where predictions and metrics go, as JSON lines; the first
        process writes them.
      num_examples: how many examples of each task; all by default.
    """
    self._files = object_stores.Mirror(output_dir, '*-metrics.jsonl')
    self.texts: dict[str, str] = {}
    self._task = task
    self._predictor = predictor
    self._evaluator = seqio.Evaluator(
      task,
      task_examples.FeatureConverter(
        adapters.prefix(predictor.network), pack=False
      ),
      eval_split=split,
      sequence_length=dict(lengths),
      num_examples=num_examples,
      logger_cls=[seqio.JSONLogger] if processes.is_first() else [],
      log_dir=self._files.folder,
      async_compute_metrics=False,
    )

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Returns `task/metric` -> value, in the task's own units.

    Several tasks have an average as well, `mixture/average`; see `average`.

    Raises:
      OSError: the predictions cannot be written.
    """
    if not self._evaluator.eval_tasks:
      return {}  # No task has metrics for this split.

    def predict(dataset: Any) -> list[tuple[int, np.ndarray]]:
      return self._predictor(params, dataset.as_numpy_iterator())

    try:
      future, _ = self._evaluator.evaluate(
        compute_metrics=True, step=step, predict_fn=predict
      )
    except ValueError as e:
      # How seqio says whatever went wrong: a full disk, or a task's own bug.
      if isinstance(e.__cause__, OSError | tf.errors.OpError):
        raise OSError(str(e.__cause__).splitlines()[0]) from e
      raise
    if processes.is_first():
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

  As SuperGLUE averages (Wang et al. 2019, Section 3.1), and the paper (App. G):
  a task with two metrics counts no more than one with a single metric.

  Args:
    scores: task -> metric -> value.
  """
  return float(np.mean([np.mean(list(m.values())) for m in scores.values()]))


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is evaluated, and how.

  Attributes:
    task: a registered task or mixture.
    feature_lengths: feature -> longest length; longer examples are cut.
    decoder: greedy or beam search, for the task's metrics.
    split: which split.
    batch_size: examples that are evaluated at once, or a few more: as many as
      devices can share evenly.
    num_examples: how many, of each task; all by default.
    max_decode_length: tokens decoded at most; by default as many as targets
      may have.
    loss: of the teacher-forced evaluation.
  """

  task: str
  feature_lengths: Mapping[str, values.Positive]
  decoder: Decoder
  split: str = 'validation'
  batch_size: values.Positive = 32
  num_examples: values.Positive | None = None
  max_decode_length: values.Positive | None = None
  loss: losses.Loss = dataclasses.field(
    default_factory=lambda: losses.Loss(z_loss=0.0)
  )

  def check(self, network: nn.Module) -> None:
    """Reads one example, so that what is missing is missed at once.

    Args:
      network: the model, which must know the task's vocabulary.

    Raises:
      UserError: the task, the split or the data are not there, or a number
        makes no sense.
    """
    check_positive('EVAL_BATCH_SIZE', self.batch_size)
    if self.num_examples is not None:
      check_positive('EVAL_EXAMPLES', self.num_examples)
    task = task_checks.check(
      self.task, self.feature_lengths, self.batch_size, self.split
    )
    vocabulary.check_fits(task.output_features, network)

  def prepare(
    self,
    network: nn.Module,
    partitioner: partitioning.Partitioner,
    output_dir: str,
  ) -> 'Evaluator':
    """Returns a function that evaluates parameters, again and again."""
    return Evaluator(self, network, partitioner, output_dir)

  def predictor(
    self, network: nn.Module, partitioner: partitioning.Partitioner
  ) -> Predictor:
    """Returns what decodes examples."""
    return Predictor(
      network,
      self.decoder,
      self.batch_size,
      self.max_decode_length or self.feature_lengths['targets'],
      partitioner,
    )


class Evaluator:
  """Evaluates parameters: the loss, and the task's metrics."""

  def __init__(
    self,
    evaluation: Evaluation,
    network: nn.Module,
    partitioner: partitioning.Partitioner,
    output_dir: str,
  ) -> None:
    """Reads the data; see `Evaluation.prepare`."""
    self._evaluation = evaluation
    self._network = network
    self._partitioner = partitioner
    self._sums = jax.jit(
      trainer_lib.forward,
      static_argnames=('network', 'loss'),
      out_shardings=partitioner.replicated,
    )
    self._score = TaskEvaluator(
      evaluation.task,
      evaluation.split,
      evaluation.feature_lengths,
      evaluation.predictor(network, partitioner),
      output_dir,
      evaluation.num_examples,
    )

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Returns `eval/loss`, `eval/accuracy` (per token), `task/metric`."""
    forced = self._teacher_forced(params)
    return {
      f'eval/{name}': value for name, value in forced.items()
    } | self._score(params, step)

  @property
  def texts(self) -> Mapping[str, str]:
    """What the task's metrics said in words the last time."""
    return self._score.texts

  def _teacher_forced(self, params: PyTree) -> dict[str, float]:
    evaluation = self._evaluation
    batches = data.eval_batches(
      seqio.get_mixture_or_task(evaluation.task),
      evaluation.feature_lengths,
      self._partitioner.round_up(evaluation.batch_size),
      evaluation.split,
      evaluation.num_examples,
      adapters.prefix(self._network),
    )
    place = self._partitioner.place_batch
    network, loss = self._network, evaluation.loss
    sums = [
      jax.device_get(self._sums(network, loss, params, place(batch)))
      for batch in batches
    ]
    total = jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *sums)
    averages = trainer_lib.averages(total)
    del averages['z_loss']  # Part of what is minimized, not of the loss.
    return {name: float(value) for name, value in averages.items()}
