"""Layers of a decoder-only transformer, in Flax NNX.

Weights keep the Hugging Face orientation `[out, in]` and names, so a checkpoint
loads without a transposed copy. Inside `jax.shard_map` every weight is the
local shard of a tensor rank: head counts come from the weights' shapes, never
from the configuration. Column-parallel projections hold some of the outputs,
row-parallel ones some of the inputs and sum over the axis that they are given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from infinite_llm.models import rope
from infinite_llm.models.registry import ModelConfig

_INIT_STDDEV = 0.02


def _random(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike):
  return nnx.Param(
    _INIT_STDDEV * jax.random.normal(rngs.params(), shape, dtype)
  )


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Multiplies by a weight in the Hugging Face orientation.

  Args:
    x: `[T, in]` activations.
    weight: `[out, in]`.

  Returns:
    `[T, out]` float32.
  """
  contracting = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(
    x, weight, contracting, preferred_element_type=jnp.float32
  )


class Linear(nnx.Module):
  """A projection that accumulates in float32."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    *,
    bias: bool,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.weight = _random(rngs, (out_dim, in_dim), dtype)
    self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None

  def __call__(
    self,
    x: jax.Array,
    *,
    sum_over: str | None = None,
    outputs: tuple[jax.Array, int] | None = None,
  ) -> jax.Array:
    """Projects, in the activations' dtype.

    *Collective over axis* `sum_over`.

    Args:
      x: `[T, in]` activations; a shard of them where `sum_over` is given.
      sum_over: Mesh axis over which a row-parallel weight is sharded.
      outputs: `(start, size)` of the outputs that are wanted; None is all.

    Returns:
      `[T, out]` in the dtype of `x`.
    """

    def wanted(parameter: jax.Array) -> jax.Array:
      if outputs is None:
        return parameter
      return jax.lax.dynamic_slice_in_dim(parameter, *outputs)

    y = matmul(x, wanted(self.weight[...]))
    if sum_over is not None:
      # The links carry the activations' dtype; the bias is added once, after.
      y = jax.lax.psum(y.astype(x.dtype), sum_over)
    if self.bias is not None:
      y = y + wanted(self.bias[...]).astype(y.dtype)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation of the last dimension, in float32."""

  def __init__(self, dim: int, *, eps: float, dtype: DTypeLike):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises `[..., dim]`; gives the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
  """Token vectors, also used as the output head where the two are tied.

  The vocabulary is sharded over the tensor axis or replicated; the shape of the
  local weight tells which.
  """

  def __init__(
    self, vocab_size: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.vocab_size = vocab_size
    self.weight = _random(rngs, (vocab_size, dim), dtype)

  def _is_sharded(self) -> bool:
    return self.weight.shape[0] != self.vocab_size

  def embed(self, tokens: jax.Array, tensor_axis: str | None) -> jax.Array:
    """Looks tokens up.

    *Collective over axis* `tensor_axis` where the vocabulary is sharded.

    Args:
      tokens: `[T]` int32 in `[0, V)`.
      tensor_axis: Mesh axis of the vocabulary's shards.

    Returns:
      `[T, dim]` in the weight's dtype.
    """
    weight = self.weight[...]
    if not self._is_sharded():
      return weight.at[tokens].get(mode="clip")
    row = tokens - jax.lax.axis_index(tensor_axis) * weight.shape[0]
    is_here = (row >= 0) & (row < weight.shape[0])
    vectors = weight.at[row].get(mode="clip")
    return jax.lax.psum(
      jnp.where(is_here[:, None], vectors, jnp.zeros_like(vectors)), tensor_axis
    )

  def logits(self, hidden: jax.Array, tensor_axis: str | None) -> jax.Array:
    """Scores the whole vocabulary.

    *Collective over axis* `tensor_axis` where the vocabulary is sharded.

    Args:
      hidden: `[R, dim]`.
      tensor_axis: Mesh axis of the vocabulary's shards.

    Returns:
      `[R, V]` float32, the same on every rank.
    """
    scores = matmul(hidden, self.weight[...])
    if not self._is_sharded():
      return scores
    return jax.lax.all_gather(
      scores, tensor_axis, axis=1, tiled=True, to="invarying"
    )


class Attention(nnx.Module):
  """Projections and rotation around an attention that the caller supplies."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.head_dim = config.head_dim
    self.num_q_heads = config.num_q_heads
    self.num_kv_heads = config.num_kv_heads
    q_dim = config.num_q_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim

    def linear(in_dim, out_dim, bias):
      return Linear(in_dim, out_dim, bias=bias, dtype=dtype, rngs=rngs)

    self.q_proj = linear(config.model_dim, q_dim, config.qkv_bias)
    self.k_proj = linear(config.model_dim, kv_dim, config.qkv_bias)
    self.v_proj = linear(config.model_dim, kv_dim, config.qkv_bias)
    self.o_proj = linear(q_dim, config.model_dim, config.out_bias)

    def norm():
      if not config.qk_norm:
        return None
      return RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype)

    self.q_norm, self.k_norm = norm(), norm()

  def __call__(
    self,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    cache: Any,
    attend: Callable[..., tuple[jax.Array, Any]],
    tensor_axis: str | None,
  ) -> tuple[jax.Array, Any]:
    """Attends.

    *Collective over axis* `tensor_axis`.

    Args:
      x: `[T, model_dim]` normalised activations.
      rotation: Cosines and sines, `[T, D // 2]` float32 each.
      cache: Passed through `attend`.
      attend: `(q [T, H, D], k [T, K, D], v [T, K, D], cache) -> (out [T, H, D],
        cache)` with the local heads of this tensor rank.
      tensor_axis: Mesh axis that the heads are sharded over.

    Returns:
      `[T, model_dim]` in the dtype of `x`, and the cache.
    """

    def heads(y: jax.Array) -> jax.Array:
      return y.reshape(y.shape[0], -1, self.head_dim)

    q = heads(self.q_proj(x))
    mine = self._own_kv_head(q.shape[1], tensor_axis)
    k, v = (
      heads(projection(x, outputs=mine))
      for projection in (self.k_proj, self.v_proj)
    )
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    out, cache = attend(q, k, v, cache)
    out = out.astype(x.dtype).reshape(out.shape[0], -1)
    return self.o_proj(out, sum_over=tensor_axis), cache

  def _own_kv_head(
    self, num_local_q_heads: int, tensor_axis: str | None
  ) -> tuple[jax.Array, int] | None:
    """Where a rank's KV head lies in projections that all ranks hold whole.

    Args:
      num_local_q_heads: Query heads of this rank.
      tensor_axis: Mesh axis that the heads are sharded over.

    Returns:
      `(start, size)` of its outputs; None where the ranks do not outnumber the
      KV heads and each holds just its own.
    """
    ranks = self.num_q_heads // num_local_q_heads
    if ranks <= self.num_kv_heads:
      return None
    head = jax.lax.axis_index(tensor_axis) * self.num_kv_heads // ranks
    return head * self.head_dim, self.head_dim


class GatedMlp(nnx.Module):
  """`down(silu(gate(x)) * up(x))`."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    def linear(in_dim, out_dim):
      bias = config.mlp_bias
      return Linear(in_dim, out_dim, bias=bias, dtype=dtype, rngs=rngs)

    self.gate_proj = linear(config.model_dim, config.mlp_dim)
    self.up_proj = linear(config.model_dim, config.mlp_dim)
    self.down_proj = linear(config.mlp_dim, config.model_dim)

  def __call__(self, x: jax.Array, tensor_axis: str | None) -> jax.Array:
    """Maps `[T, model_dim]` to the same.

    *Collective over axis* `tensor_axis`.
    """
    inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(inner, sum_over=tensor_axis)
