import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.models import rope
from infinite_llm.models.rope import RopeConfig

LLAMA3 = RopeConfig(
  theta=500_000.0,
  scaling="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)
CONFIGS = (
  RopeConfig(),
  RopeConfig(theta=1e6),
  RopeConfig(theta=1e32),
  RopeConfig(scaling="linear", factor=4.0),
  LLAMA3,
)
# One unit in the last place of float32 at half a turn, and cosine's own error.
TOLERANCE = 5e-7


def _exact(positions, radians):
  """Cosines and sines of float64 angles: good to 1e-9 at these positions."""
  angles = np.asarray(positions, np.float64)[:, None] * radians
  return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("last", [200, 131_072, 1_000_000, 4_200_000, 2**30])
def test_rotation_is_exact_at_any_position(config, head_dim, last):
  positions = np.unique(np.linspace(0, last, 257).astype(np.int32))
  positions = np.append(positions, last - np.arange(5)).astype(np.int32)
  radians = rope.frequencies(config, head_dim)

  cos, sin = rope.rotation(jnp.asarray(positions), radians)

  exact_cos, exact_sin = _exact(positions, radians)
  np.testing.assert_allclose(cos, exact_cos, atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(sin, exact_sin, atol=TOLERANCE, rtol=0)


def test_the_plain_formula_agrees_at_small_positions_only():
  radians = rope.frequencies(RopeConfig(), 64)

  def error(position):
    exact, _ = rope.rotation(jnp.array([position]), radians)
    plain = jnp.cos(jnp.float32(position) * radians.astype(np.float32))
    return np.abs(plain - exact[0]).max()

  assert error(100) < 1e-5
  assert error(1_000_003) > 1e-2


def test_tiny_frequencies_do_not_turn_at_all():
  radians = rope.frequencies(RopeConfig(theta=1e32), 16)

  cos, sin = rope.rotation(jnp.array([4_000_000]), radians)

  assert radians[-1] < 1e-27
  assert cos[0, -1] == 1
  assert sin[0, -1] == 0


def test_padding_rows_get_a_finite_rotation():
  cos, sin = rope.rotation(jnp.array([-1]), rope.frequencies(LLAMA3, 128))

  assert np.isfinite(cos).all()
  assert np.isfinite(sin).all()


def test_rotation_is_the_same_under_jit():
  positions = jnp.array([0, 1, 4_194_304, 999_999])
  radians = rope.frequencies(LLAMA3, 64)

  jitted = jax.jit(lambda p: rope.rotation(p, radians))(positions)

  np.testing.assert_allclose(
    jitted, rope.rotation(positions, radians), atol=TOLERANCE, rtol=0
  )


def test_scores_depend_on_distance_alone_even_far_out():
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, 1, 1, 64), np.float32)
  radians = rope.frequencies(RopeConfig(), 64)

  def score(position):
    positions = jnp.array([position, position - 77])
    cos, sin = rope.rotation(positions, radians)
    rotated_q = rope.rotate(jnp.asarray(q), cos[:1], sin[:1])
    return jnp.sum(rotated_q * rope.rotate(jnp.asarray(k), cos[1:], sin[1:]))

  near, far = score(77), score(3_999_999)

  np.testing.assert_allclose(far, near, atol=2e-5)


def test_dimension_pairs_are_half_a_head_apart():
  x = jnp.array([[[1.0, 0.0, 0.0, 2.0]]])
  angles = jnp.array([[0.3, 0.5]])

  rotated = rope.rotate(x, jnp.cos(angles), jnp.sin(angles))

  expected = [math.cos(0.3), -2 * math.sin(0.5), math.sin(0.3)]
  np.testing.assert_allclose(
    rotated[0, 0], [*expected, 2 * math.cos(0.5)], atol=1e-6
  )


def test_rotation_is_computed_in_float32_whatever_the_dtype():
  x = jnp.ones((1, 1, 4), jnp.bfloat16)
  angles = jnp.array([[0.01, 0.02]])

  rotated = rope.rotate(x, jnp.cos(angles), jnp.sin(angles))

  assert rotated.dtype == jnp.bfloat16
  exact = rope.rotate(x.astype(jnp.float32), jnp.cos(angles), jnp.sin(angles))
  np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


def test_linear_scaling_divides_every_frequency():
  config = RopeConfig(scaling="linear", factor=4.0)

  np.testing.assert_allclose(
    rope.frequencies(config, 64), rope.frequencies(RopeConfig(), 64) / 4
  )


def test_llama3_scaling_keeps_fast_blends_middle_divides_slow_frequencies():
  plain = rope.frequencies(RopeConfig(theta=LLAMA3.theta), 128)
  scaled = rope.frequencies(LLAMA3, 128)
  wavelengths = 2 * math.pi / plain
  fast, slow = wavelengths < 8192 / 4, wavelengths > 8192 / 1
  middle = ~(fast | slow)

  np.testing.assert_allclose(scaled[fast], plain[fast])
  np.testing.assert_allclose(scaled[slow], plain[slow] / 8)
  assert middle.any()
  assert (scaled[middle] < plain[middle]).all()
  assert (scaled[middle] > plain[middle] / 8).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"theta": 0.0}, r"theta must be positive and finite; got 0\.0\."),
    ({"theta": math.inf}, r"theta must be positive and finite; got inf\."),
    ({"scaling": "yarn"}, r"scaling must be one of none, linear, llama3; got"),
    ({"factor": -1.0}, r"factor must be positive and finite; got -1\.0\."),
    ({"high_freq_factor": 0.5}, r"high_freq_factor must be above .* got 0\.5"),
    (
      {"original_max_position_embeddings": 0},
      r"original_max_position_embeddings must be at least 1; got 0\.",
    ),
  ],
)
def test_wrong_configurations_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    RopeConfig(**fields)
