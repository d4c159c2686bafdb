"""LoRA (Hu et al., 2022): a low-rank map parallel to a frozen one."""

from collections.abc import Collection, Mapping
import dataclasses
import re
from typing import Any, ClassVar

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
  """y = xW + (alpha / rank) · dropout(x)AB (Section 4.1).

  A is `lora_a` [n, rank]. B is `lora_b` [rank, features] and starts at zero, so
  that the network starts as the seed. Training never forms the product AB.

  Attributes:
    rank: columns of A.
    alpha: AB is multiplied by alpha / rank.
    dropout_rate: dropout of the low-rank path's input.
    targets: regular expression that matches the paths of linear maps.
  """

  rank: values.Positive = 8
  alpha: values.AboveZero = 8.0
  dropout_rate: values.BelowOne = 0.0
  targets: str = r'.*attention/(query|value)'

  added: ClassVar[str] = r'.*/lora_[ab]'
  peft_type: ClassVar[str] = 'LORA'

  def __post_init__(self) -> None:
    values.check_fields(self, 'LORA_')
    # The network multiplies in float32, so the factor must be valid there too.
    if not 0 < self.alpha / self.rank <= float(np.finfo(np.float32).max):
      raise UserError(
        f'LORA_ALPHA must be above 0 and finite, it is {self.alpha!r}'
      )
    try:
      re.compile(self.targets)
    except re.error as e:
      raise UserError(
        f'LORA_TARGETS is no regular expression: {self.targets!r}: {e}'
      ) from e

  def linear(self, linear: adapters.Linear, x: jax.Array) -> jax.Array:
    """Adds the low-rank map's output."""
    y = linear.apply(x)
    if not re.fullmatch(self.targets, linear.path):
      return y
    a = linear.parameter(
      'lora_a',
      _INIT_A,
      (x.shape[-1], self.rank),
      (linear.axes[0], 'lora_rank'),
    )
    b = linear.parameter(
      'lora_b',
      nn.initializers.zeros,
      (self.rank, linear.features),
      ('lora_rank', linear.axes[1]),
    )
    if self.dropout_rate:
      x = nn.Dropout(self.dropout_rate)(x, deterministic=linear.deterministic)
    low = jnp.dot(x.astype(linear.dtype), a.astype(linear.dtype))
    scale = jnp.asarray(self.alpha / self.rank, linear.dtype)
    return y + jnp.dot(low, b.astype(linear.dtype)) * scale

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds (alpha / rank) · AB to the kernels."""
    merged = self.without_added(params)
    for path in params:
      if path.endswith('/lora_a'):
        module = path.removesuffix('/lora_a')
        product = np.matmul(params[path], params[f'{module}/lora_b'])
        kernel = merged[f'{module}/kernel']
        scaled = np.float32(self.alpha / self.rank) * product
        merged[f'{module}/kernel'] = (kernel + scaled).astype(kernel.dtype)
    return merged

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    del modules, base
    return {
      'r': self.rank,
      'lora_alpha': self.alpha,
      'lora_dropout': self.dropout_rate,
    }

  @classmethod
  def peft_read(
    cls,
    stated: json_object.JsonObject,
    modules: Collection[str],
    base: peft.Base,
  ) -> 'LoRA':
    """See `adapters.Adapter`."""
    return cls(
      rank=stated.size('r'),
      alpha=stated.get('lora_alpha', float),
      dropout_rate=stated.get('lora_dropout', float, 0.0),
      targets=_targets(modules, base.names),
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


def _targets(modules: Collection[str], known: Collection[str]) -> str:
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
