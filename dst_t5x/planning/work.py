"""The work of a training run, known in advance: steps, tokens, operations."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax

from dst_t5x.config import binaries
from dst_t5x.core import parts
from dst_t5x.engine import sources
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import api
from dst_t5x.runs import plan as plan_lib

# Gin files around those of a training command. With the last one, the command
# that gin/runs/estimate.gin configures accepts the training command's flags.
_FIRST, _LAST = 'gin/runs/train.gin', 'gin/runs/estimate.gin'


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a run.

  Attributes:
    train_steps: steps of the run.
    parameters: parameters of the model, including a method's.
    tokens_per_step: inputs and targets of a batch, padding included.
    flops_per_step: floating-point operations of a step. Each weight that a
      token passes takes 2 in the forward pass and 4 in the backward pass. The
      products within attention, rematerialisation and evaluation are left out.
  """

  train_steps: int
  parameters: int
  tokens_per_step: int
  flops_per_step: float


def work(
  trainer: trainer_lib.Trainer,
  train_data: sources.TrainData,
  plan: plan_lib.Plan,
  training: Callable[..., Any] | None = None,
) -> Work:
  """Returns the work of a run; the arguments are training's.

  Args:
    trainer: network and method.
    train_data: batch size and lengths.
    plan: the number of steps.
    training: unused; lets gin accept the flags of training.
  """
  del training
  shapes = _shapes(trainer.network)
  of_example = trainer.network.work_of_example(
    shapes, train_data.feature_lengths
  )
  return Work(
    train_steps=plan.train_steps,
    parameters=sum(leaf.size for leaf in shapes.values()),
    tokens_per_step=train_data.batch_size * of_example.tokens,
    flops_per_step=6.0 * train_data.batch_size * of_example.products,
  )


@functools.lru_cache(maxsize=64)
def _shapes(network: api.Network) -> dict[str, jax.ShapeDtypeStruct]:
  return parts.flatten(api.shapes(network))


def with_files(flags: Sequence[str]) -> list[str]:
  """Returns a training command's flags, surrounded by the estimate's files."""
  return [f'--gin_file={_FIRST}', *flags, f'--gin_file={_LAST}']


def of_flags(flags: Sequence[str]) -> dict[str, float]:
  """Returns the work of `python -m dst_t5x.train FLAGS`, as a dictionary."""
  return dataclasses.asdict(binaries.parse(with_files(flags), work)())
