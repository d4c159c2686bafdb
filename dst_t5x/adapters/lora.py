"""LoRA (Hu et al., 2022): a low-rank map parallel to a frozen one.

With `rank_stabilized` it is rsLoRA (Kalajdzievski, 2023). DoRA and PiSSA are
subclasses.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math
import re
from typing import Any, ClassVar, Self

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError

# U(−1/√n, 1/√n), the initialisation of Hugging Face PEFT.
_INIT_A = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


@stable_ids.called('lora')
@dataclasses.dataclass(frozen=True)
class LoRA(adapters.Adapter):
  """y = xW + scale · dropout(x)AB, with scale = alpha / rank (Section 4.1).

  A is `lora_a` [n, rank]. B is `lora_b` [rank, features] and starts at zero, so
  that the network starts as the seed. Training never forms the product AB.

  Attributes:
    rank: columns of A.
    alpha: numerator of the scale.
    dropout_rate: dropout of the low-rank path's input.
    targets: regular expression that matches the paths of linear maps.
    rank_stabilized: whether the scale is alpha / √rank, with which the size of
      the output and of the gradients does not depend on the rank
      (Kalajdzievski, 2023, Theorem 3.2).
  """

  rank: values.Positive = 8
  alpha: values.AboveZero = 8.0
  dropout_rate: values.BelowOne = 0.0
  targets: str = r'.*attention/(query|value)'
  rank_stabilized: bool = False

  added: ClassVar[str] = r'.*/lora_[ab]'
  peft_type: ClassVar[str] = 'LORA'

  def __post_init__(self) -> None:
    values.check_fields(self, 'LORA_')
    # The network multiplies in float32, so the factor must be valid there too.
    if not 0 < self.scale <= float(np.finfo(np.float32).max):
      raise UserError(
        f'LORA_ALPHA must be above 0 and finite, it is {self.alpha!r}'
      )
    check_targets(self.targets)

  @property
  def scale(self) -> float:
    """The factor of AB."""
    rank = math.sqrt(self.rank) if self.rank_stabilized else self.rank
    return self.alpha / rank

  def linear(self, linear: adapters.Linear, x: jax.Array) -> jax.Array:
    """Changes the output of the linear maps that are targets."""
    y = linear.apply(x)
    return self.adapted(linear, x, y) if self.is_target(linear) else y

  def is_target(self, linear: adapters.Linear) -> bool:
    """Whether a linear map is adapted."""
    return bool(re.fullmatch(self.targets, linear.path))

  def adapted(
    self, linear: adapters.Linear, x: jax.Array, y: jax.Array
  ) -> jax.Array:
    """Returns the output of an adapted map.

    Args:
      linear: the linear map.
      x: its input, [..., n].
      y: its own output, [..., features].
    """
    a, b = self.factors(linear, x.shape[-1])
    return y + self.product(linear, dropped(linear, x, self.dropout_rate), a, b)

  def factors(
    self, linear: adapters.Linear, n: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns A [n, rank] and B [rank, features] of a linear map, float32."""
    a = linear.parameter(
      'lora_a', _INIT_A, (n, self.rank), (linear.axes[0], 'lora_rank')
    )
    b = linear.parameter(
      'lora_b',
      nn.initializers.zeros,
      (self.rank, linear.features),
      ('lora_rank', linear.axes[1]),
    )
    return a, b

  def product(
    self, linear: adapters.Linear, x: jax.Array, a: jax.Array, b: jax.Array
  ) -> jax.Array:
    """Returns scale · xAB, [..., features], in the activations' type."""
    low = jnp.dot(x.astype(linear.dtype), a.astype(linear.dtype))
    scale = jnp.asarray(self.scale, linear.dtype)
    return jnp.dot(low, b.astype(linear.dtype)) * scale

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds scale · AB to the kernels."""
    merged = self.without_added(params)
    for module in adapters.modules_of(params, self.added):
      path = f'{module}/{adapters.KERNEL}'
      merged[path] = self.merged_kernel(module, params).astype(
        merged[path].dtype
      )
    return merged

  def merged_kernel(
    self, module: str, params: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """Returns the merged kernel of a linear map, [..., n, features]."""
    a, b = params[f'{module}/lora_a'], params[f'{module}/lora_b']
    scaled = np.float32(self.scale) * np.matmul(a, b)
    return params[f'{module}/{adapters.KERNEL}'] + scaled

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    del modules, base
    return {
      'r': self.rank,
      'lora_alpha': self.alpha,
      'lora_dropout': self.dropout_rate,
      **({'use_rslora': True} if self.rank_stabilized else {}),
      **self.peft_options,
    }

  @classmethod
  def peft_read(
    cls,
    stated: json_object.JsonObject,
    modules: Collection[str],
    base: peft.Base,
  ) -> Self:
    """See `adapters.Adapter`."""
    return cls(
      rank=stated.size('r'),
      alpha=stated.get('lora_alpha', float),
      dropout_rate=stated.get('lora_dropout', float, 0.0),
      targets=targets_of(modules, base.names),
      rank_stabilized=stated.get('use_rslora', bool, False),
    )

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    tensors = []
    for module in sorted(modules):
      n, features = base.shapes[module]
      for leaf, name, shape in (
        ('lora_a', 'lora_A.weight', (self.rank, n)),
        ('lora_b', 'lora_B.weight', (features, self.rank)),
      ):
        path = f'{module}/{leaf}'
        tensors.append(
          peft.Tensor(path, name, shape, shape[::-1], True, module)
        )
    return tensors


def check_targets(targets: str) -> None:
  """Raises UserError if LORA_TARGETS is no regular expression."""
  try:
    re.compile(targets)
  except re.error as e:
    raise UserError(
      f'LORA_TARGETS is no regular expression: {targets!r}: {e}'
    ) from e


def dropped(linear: adapters.Linear, x: jax.Array, rate: float) -> jax.Array:
  """Returns an input with dropout, if there is any."""
  if not rate:
    return x
  return nn.Dropout(rate)(x, deterministic=linear.deterministic)


def targets_of(modules: Collection[str], known: Collection[str]) -> str:
  """Returns the targets that match just these of the known linear maps."""
  ends = '|'.join(sorted({module.rpartition('/')[2] for module in modules}))
  # All layers of a stack, which the network may have stacked.
  stacks = {re.sub(r'layers_\d+', r'layers(_\\d+)?', m) for m in modules}
  for targets in (
    f'.*attention/({ends})',
    f'.*/({ends})',
    '|'.join(sorted(stacks)),
  ):
    if {m for m in known if re.fullmatch(targets, m)} == set(modules):
      return targets
  return '|'.join(sorted(map(re.escape, modules)))
