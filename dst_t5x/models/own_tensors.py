"""Small tensors of which every example of a batch has its own.

For serving: the examples of a batch are decoded with different subsets of one
seed. What a linear map or a table of embeddings makes of an example is
corrected after the fact, see `serving.corrections`; of all other parameters,
which are small, every example has a whole tensor.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax

Array = jax.Array
# Path -> [batch, …], of the parameters that are neither the matrix of a linear
# map nor a table of embeddings.
Tensors = Mapping[str, Array]
Interceptor = Callable[..., Any]


def of(module: nn.Module, tensors: Tensors) -> dict[str, Array]:
  """Returns name -> [batch, …], of the parameters that a module itself has."""
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
    module: of which nothing is used but its fields; no module is inside.
    own: name -> [batch, …], all of its parameters.
    *args: arrays with the batch as axis 0.
    **kwargs: what is the same for all.

  Returns:
    What the module returns, with the batch as axis 0.
  """
  plain = module.clone(parent=None)

  def of_example(params: dict[str, Array], *x: Any) -> Any:
    return plain.apply({'params': params}, *x, **kwargs)

  return jax.vmap(of_example)(dict(own), *args)


def interceptor(tensors: Tensors) -> Interceptor:
  """Returns an interceptor for modules that work on each row by itself.

  That is, axis 0 of all their arguments and of their result is that of the
  rows, an example's beams adjacent, as of a norm. Others need one of their own.
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
