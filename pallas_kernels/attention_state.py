"""Partial attention results, and the algebra that makes them whole again.

Attention over a set of KV tokens, kept as `(out, lse)`, can be merged with
attention over any other set: with `w = exp(lse)`,

  merge(a, b) = ((w_a * out_a + w_b * out_b) / (w_a + w_b), log(w_a + w_b))

which is FlashAttention's split-KV rule, and DistAttention's (arXiv 2401.02669,
section 4.1). It is commutative, and the state of no tokens at all, `EMPTY = (0,
-inf)`, is its identity, both to the bit; and it is associative. So it does not
matter how a context is cut over instances, nor in which order answers come.

Associative as far as float32 goes: a merge rounds `lse`, and a weight errs by
what its `lse` does, `2**-24 * |lse|`. That is nothing for trained models; with
logits in the thousands it is 1e-4, and past `2**24` the algebra is lost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttentionState(NamedTuple):
  """Attention of some queries over some of their context.

  Attributes:
    out: `[..., T, H, D]` float32. Softmax-normalised output; 0 where empty.
    lse: `[..., T, H]` float32. Natural log of the sum of exp(logits); -inf
      where empty.
  """

  out: jax.Array
  lse: jax.Array


def empty_state(shape: tuple[int, ...]) -> AttentionState:
  """Returns the state of queries that saw no token: the identity of merge.

  Args:
    shape: `(T, H, D)`, or any shape that ends so.

  Returns:
    `AttentionState` of zeros and -inf.
  """
  return AttentionState(
    out=jnp.zeros(shape, jnp.float32),
    lse=jnp.full(shape[:-1], -jnp.inf, jnp.float32),
  )


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
  """Combines attention over two disjoint parts of a context.

  Args:
    a: `[T, H, D]` state.
    b: `[T, H, D]` state of the same queries over other tokens.

  Returns:
    `[T, H, D]` state over both parts.
  """
  top = _finite(jnp.maximum(a.lse, b.lse))
  weight_a = jnp.exp(a.lse - top)
  weight_b = jnp.exp(b.lse - top)
  return _normalise(
    _weigh(weight_a, a.out) + _weigh(weight_b, b.out),
    weight_a + weight_b,
    top,
  )


def merge_many(states: AttentionState) -> AttentionState:
  """Combines attention over any number of disjoint parts of a context.

  Args:
    states: `[R, T, H, D]`: the states of `R` parts, stacked; `R` may be 0.

  Returns:
    `[T, H, D]` state over all parts.
  """
  top = _finite(jnp.max(states.lse, axis=0, initial=-jnp.inf))
  weights = jnp.exp(states.lse - top)
  return _normalise(
    jnp.sum(_weigh(weights, states.out), axis=0), jnp.sum(weights, axis=0), top
  )


def _finite(lse: jax.Array) -> jax.Array:
  """Replaces -inf, so that `exp(-inf - top)` is 0 rather than NaN."""
  return jnp.where(lse == -jnp.inf, 0.0, lse)


def _weigh(weight: jax.Array, out: jax.Array) -> jax.Array:
  """Scales outputs; one that weighs nothing may hold anything, even NaN."""
  weight = weight[..., None]
  return jnp.where(weight > 0, weight * out, 0.0)


def _normalise(
  out: jax.Array, weight: jax.Array, top: jax.Array
) -> AttentionState:
  """Turns sums weighted by `exp(lse - top)` into a state.

  Args:
    out: `[..., T, H, D]`. Sum of weighted outputs.
    weight: `[..., T, H]`. Sum of weights: 0, or at least 1.
    top: `[..., T, H]`. What was subtracted from every lse.
  """
  is_empty = weight == 0
  divisor = jnp.where(is_empty, 1.0, weight)
  return AttentionState(
    out=out / divisor[..., None],
    lse=jnp.where(is_empty, -jnp.inf, top + jnp.log(divisor)),
  )
