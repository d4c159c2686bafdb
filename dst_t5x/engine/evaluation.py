"""Evaluation: teacher-forced loss, and metrics over decoded predictions.

With several processes, each reads all examples, decodes its devices' share of
every batch, and ends with all predictions. Every example counts exactly once,
for any number of processes, devices and rows.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError, check_positive, first_line
from dst_t5x.engine import forced
from dst_t5x.engine import held_out as held_out_lib
from dst_t5x.engine import live
from dst_t5x.engine import losses
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.models import api
from dst_t5x.models import decoding

PyTree = Any
# The prefix and the names of the teacher-forced metrics of every evaluation.
_PREFIX = 'eval'
_FORCED = (f'{_PREFIX}/loss', f'{_PREFIX}/accuracy')
_BITS_PER_BYTE = f'{_PREFIX}/bits_per_byte'  # Of documents only.
# (network, params, prompts, max_decode_length, numbers=…) -> tokens, scores;
# see `decoding.GreedyDecoder`.
Decoder = Callable[..., tuple[jax.Array, jax.Array]]
_STATIC = ('decoder', 'network', 'max_decode_length')  # Of `_decode`.


@dataclasses.dataclass
class Predictor:
  """Decodes the examples of a dataset, in batches of one shape.

  Attributes:
    network: the model.
    decoder: greedy, beam search or sampling.
    batch_size: the number of examples in a batch, rounded up so that the
      devices share it evenly.
    max_decode_length: the most tokens to decode.
    partitioner: the mesh and its shardings.
  """

  network: api.Network
  decoder: Decoder
  batch_size: int
  max_decode_length: int
  partitioner: partitioning.Partitioner

  def __post_init__(self) -> None:
    self.batch_size = self.partitioner.round_up(self.batch_size)
    self._decode = jax.jit(
      _decode,
      static_argnames=_STATIC,
      # Every process scores all predictions.
      out_shardings=self.partitioner.replicated,
    )
    self.tokens = 0
    self.seconds = 0.0

  def __call__(
    self, params: PyTree, prompts: Iterable[tuple[int, np.ndarray]]
  ) -> list[tuple[int, np.ndarray]]:
    """Returns an (index, tokens) for each prompt.

    Args:
      params: the parameters.
      prompts: (index, tokens int32 [length]), all of one length.

    Returns:
      Pairs (index, tokens int32 [length]), without padding.
    """
    start = time.perf_counter()
    results: list[tuple[int, np.ndarray]] = []
    for indices, rows in self._batches(prompts):
      numbers = np.zeros(len(rows), np.int32)
      numbers[: len(indices)] = indices
      placed = self.partitioner.place_batch(
        {'prompts': rows, 'numbers': numbers}
      )
      tokens, _ = self._decode(
        self.decoder,
        self.network,
        params,
        placed['prompts'],
        placed['numbers'],
        self.max_decode_length,
      )
      decoded = np.asarray(tokens)[: len(indices)]
      found = decoding.continuations(self.network, decoded)
      self.tokens += sum(map(len, found))
      results.extend(zip(indices, found, strict=True))
    self.seconds += time.perf_counter() - start
    return results

  def of_examples(
    self, params: PyTree, examples: Iterable[tuple[int, Mapping[str, Any]]]
  ) -> list[tuple[int, np.ndarray]]:
    """Returns an (index, tokens) for each example; see `sources.Predict`.

    Args:
      params: the parameters.
      examples: (index, features), made by the network's feature converter.
    """
    prompt = self.network.prompt
    return self(params, ((index, prompt(of)) for index, of in examples))

  def _batches(
    self, prompts: Iterable[tuple[int, np.ndarray]]
  ) -> Iterable[tuple[list[int], np.ndarray]]:
    indices: list[int] = []
    rows: list[np.ndarray] = []
    for index, prompt in prompts:
      indices.append(int(index))
      rows.append(np.asarray(prompt))
      if len(indices) == self.batch_size:
        yield indices, np.stack(rows)
        indices, rows = [], []
    if indices:
      # The last batch is padded to the compiled shape.
      missing = self.batch_size - len(indices)
      filler = np.full_like(rows[0], self.network.pad_id)
      yield indices, np.stack([*rows, *[filler] * missing])


def _decode(
  decoder: Decoder,
  network: api.Network,
  params: PyTree,
  prompts: jax.Array,
  numbers: jax.Array,
  max_decode_length: int,
) -> tuple[jax.Array, jax.Array]:
  """Calls a decoder. One function for all, so that equal ones compile once."""
  return decoder(network, params, prompts, max_decode_length, numbers=numbers)


def check_decoder(
  decoder: Decoder,
  network: api.Network,
  batch_size: int,
  length: int,
  max_decode_length: int,
) -> None:
  """Checks a decoder by tracing it, without computing anything.

  Args:
    decoder: DECODER.
    network: the model.
    batch_size: the number of examples in a batch.
    length: the length of the inputs.
    max_decode_length: the most tokens to decode.

  Raises:
    UserError: the decoder cannot decode.
  """
  prompt = network.prompt_of_inputs(np.zeros(length, np.int32))
  prompts = jax.ShapeDtypeStruct((batch_size, len(prompt)), np.int32)
  numbers = jax.ShapeDtypeStruct((batch_size,), np.int32)
  decode = jax.jit(_decode, static_argnames=_STATIC)
  try:
    # One function for all calls: JAX remembers what it traced.
    decode.eval_shape(
      decoder, network, api.shapes(network), prompts, numbers, max_decode_length
    )
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f'DECODER {decoder!r} cannot decode: {first_line(e)}; take '
      '@decoding.GreedyDecoder(), @decoding.BeamSearch() or'
      ' @decoding.Sampling()'
    ) from e


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The settings of an evaluation.

  Attributes:
    task: a registered task or mixture.
    feature_lengths: feature -> longest length; longer examples are truncated.
    decoder: greedy, beam search or sampling, for the task's metrics.
    split: the name of the split.
    batch_size: the number of examples in a batch, rounded up so that the
      devices share it evenly.
    num_examples: the number of examples of each task; None for all.
    max_decode_length: the most tokens to decode; by default the length of the
      targets.
    loss: the loss of the teacher-forced evaluation.
    held_out: general text, whose loss is computed too; None for none.
    source: where the examples come from.
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
  held_out: held_out_lib.HeldOut | None = None
  source: sources.Source = live.LIVE

  @property
  def examples(self) -> sources.Examples:
    """The examples of the split."""
    return sources.Examples(
      self.task,
      self.feature_lengths,
      self.split,
      self.batch_size,
      self.num_examples,
    )

  def check(self, network: api.Network) -> None:
    """Checks the settings and reads one example.

    Args:
      network: the model; it must have an embedding for each id of the task.

    Raises:
      UserError: the task, the split or the data do not exist, a setting is out
        of range, the vocabulary does not fit, or the decoder cannot decode.
    """
    check_positive('EVAL_BATCH_SIZE', self.batch_size)
    if self.num_examples is not None:
      check_positive('EVAL_EXAMPLES', self.num_examples)
    if not isinstance(self.split, str):
      raise UserError(f'EVAL_SPLIT must name a split; it is {self.split!r}')
    if self.held_out is not None:
      self.held_out.check(network)
    self.source.check(self.examples, network)
    check_decoder(
      self.decoder,
      network,
      self.batch_size,
      self.feature_lengths['inputs'],
      self._max_decode_length,
    )

  def rehearse(self, network: api.Network) -> list[str]:
    """Scores two examples of each task with their targets as predictions.

    Args:
      network: the model.

    Returns:
      The names of all metrics of an evaluation.

    Raises:
      UserError: a task cannot be scored.
    """
    results = self.source.metrics(self.examples, network)
    counts_bytes = self.source.counts_bytes(self.examples)
    bits = [_BITS_PER_BYTE] if counts_bytes else []
    held_out = self.held_out.metrics() if self.held_out else []
    return [*_FORCED, *bits, *results, *held_out]

  @property
  def _max_decode_length(self) -> int:
    return self.max_decode_length or self.feature_lengths['targets']

  def prepare(
    self,
    network: api.Network,
    partitioner: partitioning.Partitioner,
    output_dir: str,
  ) -> 'Evaluator':
    """Returns a function that evaluates parameters; it reads the data once."""
    return Evaluator(self, network, partitioner, output_dir)

  def predictor(
    self, network: api.Network, partitioner: partitioning.Partitioner
  ) -> Predictor:
    """Returns a function that decodes examples."""
    return Predictor(
      network,
      self.decoder,
      self.batch_size,
      self._max_decode_length,
      partitioner,
    )


class Evaluator:
  """Evaluates parameters: the loss, and the task's metrics."""

  def __init__(
    self,
    evaluation: Evaluation,
    network: api.Network,
    partitioner: partitioning.Partitioner,
    output_dir: str,
  ) -> None:
    """Reads the data; see `Evaluation.prepare`."""
    self._network = network
    source, held_out = evaluation.source, evaluation.held_out
    self._forced = forced.ForcedEvaluator(
      source, evaluation.examples, partitioner, evaluation.loss
    )
    self._held_out = held_out.evaluator(partitioner) if held_out else None
    self._score = source.scorer(
      evaluation.examples,
      network,
      evaluation.predictor(network, partitioner).of_examples,
      output_dir,
    )

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Returns `eval/loss`, `eval/accuracy` (per token), `task/metric`.

    Documents have `eval/bits_per_byte`, too. With held-out text there are
    `held_out/loss` and, of documents, `held_out/bits_per_byte`.
    """
    results = self._forced(self._network, params).named(_PREFIX)
    results |= self._score(params, step)
    if self._held_out is not None:
      found = self._held_out(self._network, params)
      results |= held_out_lib.results_of(found)
    return results

  @property
  def texts(self) -> Mapping[str, str]:
    """The texts among the task's metrics, from the last evaluation."""
    return self._score.texts
