"""VeRA (Kopiczko et al., 2024): trained vectors between random matrices."""

from collections.abc import Collection, Mapping
import dataclasses
import math
import re
from typing import Annotated, Any, ClassVar, Self

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import lora
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core import stable_ids
from dst_t5x.core import values

_A, _B = 'vera_shared_a', 'vera_shared_b'
# A tensor that nobody filled in must not pass for one.
_UNKNOWN = nn.initializers.constant(math.nan)


@stable_ids.called('vera')
@dataclasses.dataclass(frozen=True)
class VeRA(adapters.Adapter):
  """y = xW + (((dropout(x)A) ∘ d)B) ∘ b (Section 3).

  d is `vera_d` [rank] and b is `vera_b` [features]. b starts at zero, so that
  the network starts as the seed. All maps share the random A [n, rank] and B
  [rank, features], which nobody trains. Maps of several sizes take the first
  rows of A and the first columns of B, as in Hugging Face PEFT. On the devices,
  each map has a copy of its part.

  Attributes:
    rank: columns of A.
    d_initial: initial entries of d.
    dropout_rate: dropout of the input of A.
    targets: regular expression that matches the paths of linear maps.
    projection_key: random seed of A and B.
  """

  rank: values.Positive = 256
  d_initial: float = 0.1
  dropout_rate: values.BelowOne = 0.0
  targets: str = lora.LoRA.targets
  projection_key: Annotated[int, values.Range(0, 2**32 - 1)] = 0

  added: ClassVar[str] = r'.*/vera_[db]'
  fixed: ClassVar[str] = rf'.*/({_A}|{_B})'
  peft_type: ClassVar[str] = 'VERA'

  def __post_init__(self) -> None:
    fields = values.parameters(type(self))
    values.check(
      {
        macro: (getattr(self, name), values.hint_of(fields[name]))
        for name, macro in _MACROS.items()
      }
    )
    lora.check_targets(self.targets)

  def linear(self, linear: adapters.Linear, x: jax.Array) -> jax.Array:
    """Adds the output of the random matrices."""
    y = linear.apply(x)
    if not re.fullmatch(self.targets, linear.path):
      return y
    n, features = x.shape[-1], linear.features
    rows, columns = linear.axes
    first_d = nn.initializers.constant(self.d_initial)
    d = linear.parameter('vera_d', first_d, (self.rank,), ('lora_rank',))
    b = linear.parameter(
      'vera_b', nn.initializers.zeros, (features,), (columns,)
    )
    shared_a = linear.parameter(
      _A, _UNKNOWN, (n, self.rank), (rows, 'lora_rank')
    )
    shared_b = linear.parameter(
      _B, _UNKNOWN, (self.rank, features), ('lora_rank', columns)
    )
    x = lora.dropped(linear, x, self.dropout_rate)
    dtype = linear.dtype
    low = jnp.dot(x.astype(dtype), shared_a.astype(dtype)) * d.astype(dtype)
    return y + jnp.dot(low, shared_b.astype(dtype)) * b.astype(dtype)

  def fixed_tensors(
    self, modules: Collection[str], seed: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """See `adapters.Adapter`."""
    shapes = {m: seed[f'{m}/{adapters.KERNEL}'].shape[-2:] for m in modules}
    a, b = self._drawn(shapes)
    tensors = {}
    for module, (n, features) in shapes.items():
      tensors[f'{module}/{_A}'] = np.ascontiguousarray(a[:, :n].T)
      tensors[f'{module}/{_B}'] = np.ascontiguousarray(b[:features].T)
    return tensors

  def _drawn(
    self, shapes: Mapping[str, tuple[int, ...]]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns PEFT's A [rank, largest n] and B [largest features, rank].

    Args:
      shapes: path of each adapted linear map -> [n, features].
    """
    n, features = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
    a, b = kaiming_uniform(
      self.projection_key, (self.rank, n), (features, self.rank)
    )
    return a, b

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds A diag(d) B diag(b) to the kernels."""
    merged = self.without_added(params)
    modules = adapters.modules_of(params, self.added)
    fixed = self.fixed_tensors(modules, params)
    for module in modules:
      d, b = params[f'{module}/vera_d'], params[f'{module}/vera_b']
      left = fixed[f'{module}/{_A}'] * d[..., None, :]
      right = fixed[f'{module}/{_B}'] * b[..., None, :]
      kernel = merged[f'{module}/{adapters.KERNEL}']
      whole = kernel + np.matmul(left, right)
      merged[f'{module}/{adapters.KERNEL}'] = whole.astype(kernel.dtype)
    return merged

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    del modules, base
    return {
      'r': self.rank,
      'd_initial': self.d_initial,
      'vera_dropout': self.dropout_rate,
      'projection_prng_key': self.projection_key,
      'save_projection': False,  # PEFT draws A and B again.
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
      d_initial=stated.get('d_initial', float, 0.1),
      dropout_rate=stated.get('vera_dropout', float, 0.0),
      targets=lora.targets_of(modules, base.names),
      projection_key=stated.get('projection_prng_key', int, 0),
    )

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    return [
      peft.Tensor(f'{module}/{leaf}', name, (size,), (size,), module=module)
      for module in sorted(modules)
      for leaf, name, size in (
        ('vera_d', 'vera_lambda_d', self.rank),
        ('vera_b', 'vera_lambda_b', base.shapes[module][1]),
      )
    ]

  def peft_fixed(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, np.ndarray]:
    """See `adapters.Adapter`."""
    a, b = self._drawn({module: base.shapes[module] for module in modules})
    return {'base_model.vera_A': a, 'base_model.vera_B': b}


# The macros of its fields, for messages.
_MACROS = {
  'rank': 'LORA_RANK',
  'd_initial': 'VERA_D_INITIAL',
  'dropout_rate': 'LORA_DROPOUT_RATE',
  'targets': 'LORA_TARGETS',
  'projection_key': 'VERA_PROJECTION_KEY',
}


def kaiming_uniform(
  seed: int, *shapes: tuple[int, int]
) -> tuple[np.ndarray, ...]:
  """Returns what torch draws one after the other, bit for bit.

  Torch's generator on a CPU is the Mersenne Twister of 32 bits. A number is its
  last 24 bits as a fraction, times the range, plus the lower bound; the product
  and the sum are rounded once, as by torch on a processor with fused
  multiply-add. In float64 both are exact.

  Args:
    seed: of `torch.Generator.manual_seed`, below 2³².
    *shapes: of the matrices; the second size is the fan-in.

  Returns:
    Matrices of U(−√(6 / fan-in), √(6 / fan-in)), float32.
  """
  twister = np.random.RandomState(seed)
  drawn = []
  for rows, fan_in in shapes:
    bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan_in)))
    raw = np.frombuffer(twister.bytes(4 * rows * fan_in), '<u4') & 0xFFFFFF
    x = raw.astype(np.float64) * (2.0**-24 * 2.0 * float(bound)) - float(bound)
    drawn.append(x.astype(np.float32).reshape(rows, fan_in))
  return tuple(drawn)
