"""Gives each example of a batch its own copy of small tensors.

In serving, the examples of a batch have different subsets of one seed. The
outputs of linear maps and tables of embeddings are corrected; see
`serving.corrections`. All other parameters are small, and each example has its
own copy of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax

Array = jax.Array
# Path -> [batch, …], for the parameters that are neither the matrix of a linear
# map nor a table of embeddings.
Tensors = Mapping[str, Array]
Interceptor = Callable[..., Any]


def of(module: nn.Module, tensors: Tensors) -> dict[str, Array]:
  """Returns name -> [batch, …], for the parameters of the module itself."""
  prefix = '/'.join((*module.path, ''))
  return {
    path.removeprefix(prefix): tensors[path]
    for path in tensors
    if path.startswith(prefix) and '/' not in path.removeprefix(prefix)
  }


def apply(
  module: nn.Module, own: Mapping[str, Array], *args: Any, **kwargs: Any
) -> Any:
  """Calls a module for each example with the example's own parameters.

  Args:
    module: the module; only its fields are used. It must contain no other.
    own: name -> [batch, …], all of its parameters.
    *args: arrays with the batch as axis 0.
    **kwargs: arguments that all examples share.

  Returns:
    The module's results, with the batch as axis 0.
  """
  plain = module.clone(parent=None)

  def of_example(params: dict[str, Array], *x: Any) -> Any:
    return plain.apply({'params': params}, *x, **kwargs)

  return jax.vmap(of_example)(dict(own), *args)


def interceptor(tensors: Tensors) -> Interceptor:
  """Returns an interceptor for modules that treat each row separately.

  Axis 0 of all their arguments and of their result is the rows, with an
  example's beams adjacent. Norms are such modules.
  """

  def intercept(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    is_call = context.method_name == '__call__'
    own = of(context.module, tensors) if is_call else {}
    if not own:
      return call(*args, **kwargs)
    batch = len(next(iter(own.values())))
    rows = [x.reshape(batch, -1, *x.shape[1:]) for x in args]
    y = apply(context.module, own, *rows, **kwargs)
    return y.reshape(-1, *y.shape[2:])

  return intercept
