"""Methods whose subset is chosen once and never changes.

SHiRA (Bhardwaj et al., 2024, arXiv 2406.13175, Section 3.1), Super-Tuning
(arXiv 2607.09287) and PaFi (Liao et al., 2023, arXiv 2305.16742, Figure 2)
choose it from the seed alone. SHiRA-SNIP, FISH and Child-Tuning choose it by
gradients at the seed, of the first steps, which change no parameter.

What is said of code was read there: SHiRA and Super-Tuning in Hugging Face
PEFT 0.21, PaFi in Aradhye2002/selective-peft-toolkit (by the authors of ID3),
FISH in varunnair18/FISH and Child-Tuning in RunxinXu/ChildTuning.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.method import api
from dst_t5x.method import distance_bits
from dst_t5x.method import scores
from dst_t5x.method import sparse

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ShiraRandom(sparse.Sparse):
  """SHiRA-rand: a random mask (Bhardwaj et al., 2024, Section 3.1, mask 2).

  The paper tunes 1 to 2 % of linear layers. `silos='per_tensor'` gives each
  matrix the same share of its own components; PEFT gives it r·(rows + columns)
  of them instead. The score is that of DST's random baseline.

  Attributes:
    random_seed: the seed of the mask.
  """

  silos: Any = 'per_tensor'
  random_seed: values.RandomSeed = 0

  def init(self, seed_params: PyTree) -> sparse.SparseState:
    """Returns the state with the list, which is chosen here."""
    shapes = [tensor.shape for tensor in jax.tree.leaves(seed_params)]
    layout = self.layout(seed_params)
    salts = distance_bits.salts(layout, shapes, self.random_seed)
    entries = self.of_highest(
      distance_bits.random, seed_params, seed_params, salts
    )
    return self.listed(entries, seed_params)


@dataclasses.dataclass(frozen=True)
class _OfSeed(sparse.Sparse):
  """A subset chosen by the magnitudes of the seed."""

  def _score(self) -> distance_bits.Compute:
    raise NotImplementedError

  def init(self, seed_params: PyTree) -> sparse.SparseState:
    """Returns the state with the list, which is chosen here."""
    entries = self.of_highest(self._score(), seed_params, seed_params)
    return self.listed(entries, seed_params)


@dataclasses.dataclass(frozen=True)
class ShiraMagnitude(_OfSeed):
  """SHiRA-WM: the largest |θ⁰| of each layer (Section 3.1, mask 3)."""

  silos: Any = 'per_tensor'

  def _score(self) -> distance_bits.Compute:
    return scores.largest


@dataclasses.dataclass(frozen=True)
class SuperTuning(_OfSeed):
  """Super-Tuning: the largest or the smallest |θ⁰| of each matrix.

  Ilin, Zmushko and Richtárik, 2026 (arXiv 2607.09287), with the paper's
  magnitude score, as in PEFT: the same share of each linear map. The paper's
  other score, magnitude times the norm of the inputs (Wanda), and its hybrid
  with LoRA (Supra) are not here.

  Attributes:
    end: `largest` or `smallest`, the paper's TopK and BottomK. Which is better
      depends on the model and the task, says PEFT's documentation.
  """

  silos: Any = 'per_tensor'
  end: Literal['largest', 'smallest'] = 'largest'

  def _score(self) -> distance_bits.Compute:
    return {'largest': scores.largest, 'smallest': scores.smallest}[self.end]


@dataclasses.dataclass(frozen=True)
class Pafi(_OfSeed):
  """PaFi: the smallest |θ⁰| of the whole model (Liao et al., 2023, Figure 2).

  The mask needs no data, so all tasks share it. One threshold for all tensors,
  norms included, is the selective-peft-toolkit's reading.
  """

  def _score(self) -> distance_bits.Compute:
    return scores.smallest


@dataclasses.dataclass(frozen=True)
class Scored(sparse.Sparse):
  """A subset chosen by sums over gradients at the seed.

  The method has two phases. In the first `score_steps` steps no parameter
  changes, and a term of each step's gradient is added up. The subset is chosen
  from the sums and θ⁰ when the second phase begins. The sums, of the size of
  the parameters, exist in the first phase only.

  The gradients are those of a batch's mean loss. Where a paper asks for the
  gradients of single examples, this is an approximation; BATCH_SIZE = 1 would
  be exact.

  Attributes:
    score_steps: the steps of the first phase. They count as training steps.
  """

  score_steps: values.Positive = 10

  @property
  def phase_starts(self) -> tuple[int, ...]:
    """The steps at which scoring and training begin."""
    return (0, self.score_steps)

  def phase(self, number: int) -> api.Projection:
    """Returns the scoring, or this method."""
    return self if number else Scoring(self)

  def term(self, gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns what a step adds to a tensor's sum, float32."""
    raise NotImplementedError

  def score(self) -> distance_bits.Compute:
    """Returns the score of (sums, θ⁰)."""
    return scores.largest

  def enter(
    self, params: PyTree, seed_params: PyTree, before: PyTree
  ) -> tuple[PyTree, sparse.SparseState]:
    """Chooses the subset from the sums of the first phase."""
    entries = self.of_highest(self.score(), before, seed_params)
    return params, self.listed(entries, seed_params)


@dataclasses.dataclass(frozen=True)
class Scoring(api.Projection):
  """The first phase of `Scored`: sums up terms, and changes nothing.

  Attributes:
    method: the method that the scores are for.
  """

  keep_seed = False
  acts_after_step = False
  rate = 0.0

  method: Scored

  def settings(self) -> dict[str, Any]:
    """Returns the settings of the whole method."""
    return self.method.settings()

  def free(self, shapes: PyTree) -> int:
    """Returns the budget of the whole method."""
    return self.method.free(shapes)

  def init(self, seed_params: PyTree) -> PyTree:
    """Returns sums of zero, a float32 tree like the parameters."""
    return sparse.zeros_like(seed_params)

  def seed(self, params: PyTree, kept: PyTree, state: PyTree) -> PyTree:
    """Returns the parameters, which are still the seed."""
    del kept, state
    return params

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: PyTree
  ) -> jax.Array:
    """Returns 0: no parameter is free yet."""
    del tree, params, kept, state
    return jnp.float32(0)

  def choose(
    self, tuning: api.Tuning, gradients: PyTree, kept: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Adds the terms of a step to the sums."""
    del kept, step
    sums = jax.tree.map(
      lambda total, g, p: total + self.method.term(g, p),
      tuning.state,
      gradients,
      tuning.params,
    )
    return tuning._replace(state=sums)

  def tuned(self, tree: PyTree, state: PyTree) -> PyTree:
    """Returns an empty tree: the optimizer has nothing to do."""
    del tree, state
    return {}

  def put(self, params: PyTree, tuned: PyTree, state: PyTree) -> PyTree:
    """Returns the parameters as they are."""
    del tuned, state
    return params

  def settle(
    self, tuning: api.Tuning, seed_params: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Returns what it is given."""
    del seed_params, step
    return tuning


@dataclasses.dataclass(frozen=True)
class ShiraSnip(Scored):
  """SHiRA-SNIP: the largest |g · θ⁰| of each matrix (Section 3.1, mask 5).

  The paper collects gradients "on a small calibration set", whose size this
  section does not say; here they are summed over `score_steps` steps.
  """

  silos: Any = 'per_tensor'

  def term(self, gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns the gradient."""
    return gradient.astype(jnp.float32)

  def score(self) -> distance_bits.Compute:
    """Returns |sum · θ⁰|."""
    return scores.product


@dataclasses.dataclass(frozen=True)
class _ByFisher(Scored):
  """A subset of largest diagonal Fisher information."""

  def term(self, gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns the squared gradient."""
    return jnp.square(gradient.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Fish(_ByFisher):
  """FISH mask: the largest diagonal Fisher information of the whole model.

  Sung et al., 2021 (arXiv 2111.09839). The authors' code sums squared gradients
  of single examples, 1,024 in the command for the paper's Table 1, with the
  data's labels ("empirical Fisher"). One top-k covers all tensors but the new
  classifier, which is tuned in full and counted in the budget; there is none
  here.
  """


@dataclasses.dataclass(frozen=True)
class ChildTuning(_ByFisher):
  """Child-Tuning-D: the child network of largest Fisher information.

  Xu et al., 2021 (arXiv 2109.05687), the task-driven variant: the gradients of
  all other parameters are masked. The authors' code averages the squared
  gradients of batches of 16, over an epoch of the training data and with
  dropout, and clips each tensor's gradient to norm 1 before it is squared; here
  there is no clipping. One percentile covers all tensors inside of
  layers, biases and norms included. Embeddings, pooler and classifier
  are tuned in full; here they are `exclude`d, as a budget of all parameters
  demands. The authors keep 10 to 30 % (0.3 in their script). Their Adam keeps
  moments of masked parameters, which stay zero; here it has none.
  """
