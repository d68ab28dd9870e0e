"""Rotary position embedding that stays exact at millions of positions.

`float32(position) * frequency` is off by 0.06 rad at position 1M: the product
is large, and only its remainder modulo one turn matters. Here a frequency is a
64-bit fixed-point fraction of a turn per token. Multiplying it by an integer
position wraps around modulo one turn by itself, without rounding, and the 32
highest bits of what is left become the angle: 1.5e-9 rad of resolution at any
position below 2**31.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from infinite_llm.errors import ConfigError

SCALINGS = ("none", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Frequencies of the rotary embedding.

  Attributes:
    theta: Base of the geometric series of wavelengths, up to 1e32 and beyond.
    scaling: How a context extension changed the frequencies: "none", "linear"
      (all divided by `factor`) or "llama3" (only the low ones, blended in).
    factor: Divisor of the scaled frequencies.
    low_freq_factor: "llama3": wavelengths longer than
      `original_max_position_embeddings / low_freq_factor` are fully scaled.
    high_freq_factor: "llama3": wavelengths shorter than
      `original_max_position_embeddings / high_freq_factor` are left alone.
    original_max_position_embeddings: "llama3": context before the extension, in
      tokens.
  """

  theta: float = 10_000.0
  scaling: str = "none"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    if self.scaling not in SCALINGS:
      raise ConfigError(
        f"scaling must be one of {', '.join(SCALINGS)}; got {self.scaling!r}."
      )
    for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
      value = getattr(self, name)
      if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite; got {value!r}.")
    if self.high_freq_factor <= self.low_freq_factor:
      raise ConfigError(
        "high_freq_factor must be above low_freq_factor "
        f"({self.low_freq_factor}); got {self.high_freq_factor}."
      )
    if self.original_max_position_embeddings < 1:
      raise ConfigError(
        "original_max_position_embeddings must be at least 1; got "
        f"{self.original_max_position_embeddings}."
      )


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
  """Radians that each pair of dimensions turns by per token.

  Args:
    config: Base and scaling.
    head_dim: D, even.

  Returns:
    `[D // 2]` float64, from the fastest to the slowest.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  base = np.float64(config.theta) ** -exponents
  if config.scaling == "none":
    return base
  scaled = base / config.factor
  if config.scaling == "linear":
    return scaled
  # Llama 3.1: how many wavelengths fitted into the original context decides
  # how much of the original frequency is kept.
  turns = config.original_max_position_embeddings * base / (2 * math.pi)
  kept = (turns - config.low_freq_factor) / (
    config.high_freq_factor - config.low_freq_factor
  )
  kept = np.clip(kept, 0.0, 1.0)
  return kept * base + (1 - kept) * scaled


def _fixed_point_turns(radians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Splits turns per token, times 2**64, into high and low uint32 words."""
  words = [round(math.ldexp(r / (2 * math.pi), 64)) % 2**64 for r in radians]
  high = np.array([word >> 32 for word in words], np.uint32)
  low = np.array([word & 0xFFFFFFFF for word in words], np.uint32)
  return high, low


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
  """High word of the 64-bit product of two uint32 arrays."""
  a_high, a_low = a >> 16, a & 0xFFFF
  b_high, b_low = b >> 16, b & 0xFFFF
  cross = a_high * b_low + (a_low * b_low >> 16)  # Below 2**32: no carry.
  other = a_low * b_high + (cross & 0xFFFF)
  return a_high * b_high + (cross >> 16) + (other >> 16)


def rotation(
  positions: jax.Array, radians_per_token: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Computes the rotation of each token, once for all layers.

  Args:
    positions: `[T]` int32. Negative ones (padding) get some finite rotation.
    radians_per_token: `[D // 2]` float64 from `frequencies`.

  Returns:
    Cosines and sines, `[T, D // 2]` float32 each.
  """
  high, low = _fixed_point_turns(radians_per_token)
  p = positions.astype(jnp.uint32)[:, None]
  # Bits 32-63 of position * frequency; what lies above are whole turns.
  fraction = p * high + _multiply_high(p, low)
  # As a signed word the fraction lies in [-1/2, 1/2) of a turn, where float32
  # keeps small angles of either sign precise.
  signed = jax.lax.bitcast_convert_type(fraction, jnp.int32)
  angle = signed.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates dimension pairs `(d, d + D // 2)`, as Hugging Face weights expect.

  Args:
    x: `[T, H, D]` queries or keys.
    cos: `[T, D // 2]` float32.
    sin: `[T, D // 2]` float32.

  Returns:
    `[T, H, D]` in the dtype of `x`; computed in float32.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
