"""PiSSA (Meng et al., 2024): LoRA that starts at the principal components."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from typing import Any, ClassVar

from flax import linen as nn
import jax
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import lora
from dst_t5x.adapters import peft
from dst_t5x.core import stable_ids
from dst_t5x.core.errors import UserError

# Beside `lora_a` and `lora_b`, their fixed first values.
_A, _B = 'pissa_a', 'pissa_b'
# A tensor that nobody filled in must not pass for one.
_UNKNOWN = nn.initializers.constant(math.nan)


@stable_ids.called('pissa')
@dataclasses.dataclass(frozen=True)
class PiSSA(lora.LoRA):
  """y = x(W − scale · A₀B₀) + scale · dropout(x)AB (Section 3).

  A₀ [n, rank] and B₀ [rank, features] are `pissa_a` and `pissa_b`. Of W = USVᵀ
  with the rank largest singular values, A₀ is U√S and B₀ is √SVᵀ, both divided
  by √scale. A and B start there, so that the network starts as the seed.

  The paper stores the residual W − scale · A₀B₀ in W's place. Here W stays the
  seed, and A₀ and B₀ are recomputed from it. For the same reason PEFT gets the
  equivalent LoRA of twice the rank, [A A₀] and [B −B₀].

  Attributes: see `lora.LoRA`.
  """

  fixed: ClassVar[str] = rf'.*/({_A}|{_B})'
  # What PEFT has of it is a LoRA.
  peft_options: ClassVar[Mapping[str, Any]] = {}
  peft_share: ClassVar[int] = 2

  def adapted(
    self, linear: adapters.Linear, x: jax.Array, y: jax.Array
  ) -> jax.Array:
    """See `lora.LoRA`."""
    a, b = self.factors(linear, x.shape[-1])
    axes = linear.axes
    a_0 = linear.parameter(_A, _UNKNOWN, a.shape, (axes[0], 'lora_rank'))
    b_0 = linear.parameter(_B, _UNKNOWN, b.shape, ('lora_rank', axes[1]))
    low = lora.dropped(linear, x, self.dropout_rate)
    # AB − A₀B₀ without the difference of two large products.
    y = y + self.product(linear, low, a - a_0, b)
    y = y + self.product(linear, low, a_0, b - b_0)
    if self.dropout_rate and not linear.deterministic:
      y = y + self.product(linear, low - x, a_0, b_0)
    return y

  def fixed_tensors(
    self, modules: Collection[str], seed: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """See `adapters.Adapter`."""
    tensors = {}
    for module in modules:
      kernel = seed[f'{module}/{adapters.KERNEL}']
      if self.rank > min(kernel.shape[-2:]):
        n, features = kernel.shape[-2:]
        raise UserError(
          f'LORA_RANK = {self.rank}: {module} [{n}, {features}] has only '
          f'{min(n, features)} singular values, the largest rank of PiSSA'
        )
      a, b = principal(kernel, self.rank)
      root = math.sqrt(self.scale)
      tensors[f'{module}/{_A}'] = np.asarray(a / root, np.float32)
      tensors[f'{module}/{_B}'] = np.asarray(b / root, np.float32)
    return tensors

  def initialize(
    self,
    added: Mapping[str, np.ndarray],
    seed: Mapping[str, np.ndarray],
    random: np.random.Generator,
    encode: Callable[[str], list[int]],
    embedding_scale: float = 1.0,
  ) -> dict[str, np.ndarray]:
    """Returns A₀ and B₀ as A and B."""
    del random, encode, embedding_scale
    first = {}
    for module in adapters.modules_of(added, self.added):
      first[f'{module}/lora_a'] = np.array(seed[f'{module}/{_A}'])
      first[f'{module}/lora_b'] = np.array(seed[f'{module}/{_B}'])
    return first

  def merged_kernel(
    self, module: str, params: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """See `lora.LoRA`."""
    fixed = self.fixed_tensors([module], params)
    product = np.matmul(fixed[f'{module}/{_A}'], fixed[f'{module}/{_B}'])
    merged = super().merged_kernel(module, params)
    return merged - np.float32(self.scale) * product

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    return self._as_lora().peft_settings(modules, base)

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    return self._as_lora().peft_tensors(modules, base)

  def peft_arrays(
    self, added: Mapping[str, np.ndarray]
  ) -> Mapping[str, np.ndarray]:
    """See `adapters.Adapter`."""
    arrays = {}
    for module in adapters.modules_of(added, self.added):
      a, a_0 = added[f'{module}/lora_a'], added[f'{module}/{_A}']
      b, b_0 = added[f'{module}/lora_b'], added[f'{module}/{_B}']
      arrays[f'{module}/lora_a'] = np.concatenate([a, a_0], axis=-1)
      arrays[f'{module}/lora_b'] = np.concatenate([b, -b_0], axis=-2)
    return arrays

  def _as_lora(self) -> lora.LoRA:
    """Returns the LoRA of twice the rank and the same scale."""
    # scale · rank, or scale · √rank, of that LoRA.
    twice = math.sqrt(2) if self.rank_stabilized else 2
    settings = {**dataclasses.asdict(self), 'rank': 2 * self.rank}
    return lora.LoRA(**{**settings, 'alpha': twice * self.alpha})


def principal(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the principal components of matrices.

  They are those of the smaller of WWᵀ and WᵀW, in float64: the eigenvectors are
  the singular vectors, and the rest follows by a product. The largest entry of
  each is positive, because the sign that LAPACK chooses is arbitrary.

  Args:
    kernel: W = USVᵀ, [..., n, features].
    rank: how many components; at most n and features.

  Returns:
    U√S [..., n, rank] and √SVᵀ [..., rank, features], float64.
  """
  w = np.asarray(kernel, np.float64)
  if w.shape[-2] > w.shape[-1]:
    b, a = principal(np.swapaxes(w, -1, -2), rank)
    return np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
  _, vectors = np.linalg.eigh(np.matmul(w, np.swapaxes(w, -1, -2)))
  u = vectors[..., : -rank - 1 : -1]  # Eigenvalues ascend.
  places = np.argmax(np.abs(u), axis=-2, keepdims=True)
  u = u * np.sign(np.take_along_axis(u, places, axis=-2))
  rest = np.matmul(np.swapaxes(u, -1, -2), w)  # SVᵀ.
  root = np.sqrt(np.linalg.norm(rest, axis=-1, keepdims=True))
  return u * np.swapaxes(root, -1, -2), rest / np.where(root > 0, root, 1)
