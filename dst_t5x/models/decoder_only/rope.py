"""Rotary position embeddings.

Su et al. 2021, "RoFormer". Component i of a head is rotated together with
component i + head_dim / 2, the layout of Hugging Face's checkpoints.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
  """How fast the components of a head rotate with the position.

  Attributes:
    theta: base of the wavelengths, which are 2π · theta^(2i / head_dim).
    factor: wavelengths are multiplied by it.
    original_length: positions that the model was first trained on, where only
      long wavelengths are multiplied (Llama 3); None to multiply all (linear
      scaling).
    low_frequency_factor: wavelengths above original_length over this one are
      multiplied by the whole factor.
    high_frequency_factor: wavelengths below original_length over this one stay;
      the factor grows smoothly between the two.
  """

  theta: values.AboveZero = 10_000.0
  factor: values.AboveZero = 1.0
  original_length: values.Positive | None = None
  low_frequency_factor: values.AboveZero = 1.0
  high_frequency_factor: values.AboveZero = 4.0

  def __post_init__(self) -> None:
    values.check_fields(self)
    if self.high_frequency_factor <= self.low_frequency_factor:
      raise UserError(
        f'high_frequency_factor {self.high_frequency_factor:g} of RoPE must be'
        f' above low_frequency_factor {self.low_frequency_factor:g}'
      )

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Returns radians per position, float32 `[head_dim / 2]`."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain = np.float64(self.theta) ** -exponents
    if self.original_length is None:
      return (plain / self.factor).astype(np.float32)
    # How often a component rotates within the original length decides.
    turns = self.original_length * plain / (2 * math.pi)
    low, high = self.low_frequency_factor, self.high_frequency_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    mixed = share * plain + (1 - share) * plain / self.factor
    return mixed.astype(np.float32)

  def rotations(self, positions: Array, head_dim: int) -> Array:
    """Returns cosines and sines, float32 `[2, …, head_dim / 2]`.

    Args:
      positions: int32 `[…]`.
      head_dim: components of a head.
    """
    angles = positions[..., None].astype(jnp.float32)
    angles = angles * self.frequencies(head_dim)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Array, rotations: Array) -> Array:
  """Rotates queries or keys, in float32.

  Args:
    x: `[batch, heads, length, head_dim]`.
    rotations: `[2, batch, length, head_dim / 2]`; see `Rope.rotations`.
  """
  cosines, sines = rotations[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cosines - second * sines, second * cosines + first * sines],
    axis=-1,
  )
  return rotated.astype(x.dtype)
