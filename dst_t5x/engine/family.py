"""What the sparse methods of the family cost: parameters, states, files."""

from typing import Any

import jax

from dst_t5x import subsets
from dst_t5x.core import values
from dst_t5x.engine import budget
from dst_t5x.engine import optimizers
from dst_t5x.method import api as methods
from dst_t5x.method import family
from dst_t5x.models import api

PyTree = Any

# Bytes of an entry in the file that a method's authors use: values, and one
# (SpIEL) or two (SHiRA in PEFT) positions of 4 bytes.
_ENTRY = {
  **dict.fromkeys(('shira_random', 'shira_magnitude', 'shira_snip'), 12),
  'super_tuning': 12,
  'spiel': 8,
}


def state_bytes(projection: methods.Projection, shapes: PyTree) -> int:
  """Returns the bytes of the states of AdaFactor and of a method.

  The largest of a method's phases counts. θ and a copy of θ⁰ do not count.

  Args:
    projection: the method.
    shapes: the shapes of the trained parameters.
  """
  optimizer = optimizers.adafactor(optimizers.schedule(0.1))

  def init(method: methods.Projection, params: PyTree) -> PyTree:
    state = method.init(params)
    return optimizer.init(method.tuned(params, state)), state

  def size(method: methods.Projection) -> int:
    found = jax.eval_shape(lambda params: init(method, params), shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

  return max(size(projection.at(start)) for start in projection.phase_starts)


def rows(
  network: api.Network,
  epsilon: values.Share = 1e-3,
  fraction: values.Share | None = None,
) -> list[budget.Row]:
  """Returns a row for each method of the family.

  Args:
    network: the model.
    epsilon: EPSILON.
    fraction: a share of the parameters, instead of `epsilon`.

  Raises:
    UserError: a share is out of range.
  """
  values.check({'FRACTION': (fraction, values.Share | None)})
  epsilon = fraction or epsilon
  shapes = api.shapes(network)
  found = []
  for name in family.METHODS:
    method = family.make(name, epsilon)
    free = method.free(shapes)
    n = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    file_bytes = subsets.predicted_bytes(shapes, free)
    entry = _ENTRY.get(name)
    found.append(
      budget.Row(
        name,
        f'EPSILON={epsilon:g}',
        budget.Budget(n, free, file_bytes, method.free_at_most(shapes)),
        state_bytes(method, shapes),
        entry and entry * free,
      )
    )
  return found
