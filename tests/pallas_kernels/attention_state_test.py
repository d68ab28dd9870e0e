"""The algebra of attention states."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.attention_state import (
  AttentionState,
  empty_state,
  merge,
  merge_many,
)
from tests.tolerances import lse_error, relative_error, tolerance

_T, _H, _D = 2, 3, 4
_SHAPE = (_T, _H, _D)
_LIMITS = tolerance("float32")


def _floats(bound: float):
  # XLA flushes subnormal numbers to 0 on a CPU.
  return st.floats(-bound, bound, width=32, allow_subnormal=False)


@st.composite
def _states(draw, max_lse: float) -> AttentionState:
  """States with log-sum-exps up to a size, and empty ones among them."""

  def array(elements, *shape):
    size = int(np.prod(shape))
    flat = draw(st.lists(elements, min_size=size, max_size=size))
    return np.asarray(flat, np.float32).reshape(shape)

  empty_or_not = st.one_of(st.just(-np.inf), _floats(max_lse))
  lse = array(empty_or_not, _T, _H)
  out = array(_floats(1000), *_SHAPE)
  return AttentionState(
    out=jnp.where(np.isneginf(lse)[..., None], 0, out), lse=jnp.asarray(lse)
  )


_ANY = _states(max_lse=2.0**100)
# Merging thrice rounds the log-sum-exp thrice, so it takes those of softmaxes.
_USUAL = st.one_of(_states(max_lse=64), _states(max_lse=4096))


def _property(test):
  settings = hypothesis.settings(max_examples=50)
  return settings(test)


def _assert_same(a: AttentionState, b: AttentionState):
  np.testing.assert_array_equal(a.lse, b.lse)
  np.testing.assert_array_equal(a.out, b.out)


def _assert_close(a: AttentionState, b: AttentionState):
  """Compares states made of outputs of up to 1000."""
  assert lse_error(a.lse, b.lse) <= _LIMITS.lse
  # A weight is exp(lse), so it errs by as much as lse does.
  rounding = np.maximum(1, np.abs(np.where(np.isneginf(b.lse), 0, b.lse)))
  errors = np.abs(a.out - b.out).max(axis=-1) / 1000
  assert (errors <= _LIMITS.attention * rounding).all()


def _stack(*states: AttentionState) -> AttentionState:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


_merge = jax.jit(merge)
_merge_many = jax.jit(merge_many)


@_property
@hypothesis.given(a=_ANY)
def test_empty_is_the_identity_to_the_bit(a):
  _assert_same(_merge(a, empty_state(_SHAPE)), a)
  _assert_same(_merge(empty_state(_SHAPE), a), a)


@_property
@hypothesis.given(a=_ANY, b=_ANY)
def test_merge_is_commutative_and_never_nan(a, b):
  merged = _merge(a, b)
  _assert_same(merged, _merge(b, a))
  assert not np.isnan(merged.out).any()
  assert not np.isnan(merged.lse).any()


@_property
@hypothesis.given(a=_USUAL, b=_USUAL, c=_USUAL)
def test_merge_is_associative(a, b, c):
  _assert_close(_merge(_merge(a, b), c), _merge(a, _merge(b, c)))


@_property
@hypothesis.given(a=_USUAL, b=_USUAL, c=_USUAL, d=_USUAL)
def test_merge_many_is_repeated_merge(a, b, c, d):
  expected = _merge(_merge(_merge(a, b), c), d)
  _assert_close(_merge_many(_stack(a, b, c, d)), expected)


def test_merging_parts_of_a_softmax_gives_the_whole():
  rng = np.random.default_rng(0)
  logits = 5 * rng.standard_normal((_T, _H, 30))
  values = rng.standard_normal((_H, 30, _D))

  def attend(tokens) -> AttentionState:
    lse = np.logaddexp.reduce(logits[..., tokens], axis=-1)
    weights = np.exp(logits[..., tokens] - lse[..., None])
    out = np.einsum("ths,hsd->thd", weights, values[:, tokens])
    return AttentionState(
      out=jnp.asarray(out, jnp.float32), lse=jnp.asarray(lse, jnp.float32)
    )

  whole = attend(slice(None))
  merged = merge_many(
    _stack(attend(slice(0, 1)), attend(slice(1, 17)), attend(slice(17, 30)))
  )
  assert relative_error(merged.out, whole.out) <= _LIMITS.attention
  assert lse_error(merged.lse, whole.lse) <= _LIMITS.lse


@pytest.mark.parametrize("count", [0, 1, 3])
def test_merging_only_empty_states_gives_the_empty_state(count):
  empty = empty_state(_SHAPE)
  stacked = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), empty
  )
  _assert_same(merge_many(stacked), empty)
  _assert_same(merge(empty, empty), empty)


def test_a_state_without_weight_may_hold_nan():
  # So a holder that has nothing to say need not clear its buffer.
  state = AttentionState(out=jnp.ones(_SHAPE), lse=jnp.zeros(_SHAPE[:-1]))
  rubbish = empty_state(_SHAPE)._replace(out=jnp.full(_SHAPE, jnp.nan))
  _assert_same(merge(rubbish, state), state)
  _assert_same(merge_many(_stack(rubbish, state)), state)


def test_the_far_larger_state_wins():
  small = AttentionState(
    out=jnp.full(_SHAPE, 7.0), lse=jnp.full(_SHAPE[:-1], -3e38)
  )
  large = AttentionState(
    out=jnp.full(_SHAPE, 2.0), lse=jnp.full(_SHAPE[:-1], 3e38)
  )
  _assert_same(merge(small, large), large)
