"""The call of append_kv, checked, whoever answers it."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.append_kv import mosaic_gpu, xla
from pallas_kernels.pool_layout import (
  Layer,
  check_layer,
  check_pool,
  check_scales,
  require,
  require_floating,
  require_int32,
  require_shape,
)

__all__ = ["IMPLEMENTATIONS", "append_kv"]

IMPLEMENTATIONS = dispatch.Implementations(
  "append_kv",
  {"mosaic_gpu": dispatch.on_gpu(mosaic_gpu.append), "xla": xla.append_kv},
)


def append_kv(
  kv_pool: jax.Array,
  layer: Layer,
  k: jax.Array,
  v: jax.Array,
  block_ids: jax.Array,
  offsets: jax.Array,
  *,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Writes the keys and values of `T` tokens into their rBlocks.

  In place where the caller's program donates the pool, if no reader of the pool
  as it was is left to run: for such a reader XLA copies all of it. So read the
  result, and let what is appended next depend on what was read, as a layer's
  keys and values depend on the attention of the layer before.

  Args:
    kv_pool: `[N, L, 2, K, P, D]` floating-point, or uint8 for the bits of
      float8_e4m3fn. All rBlocks of this device.
    layer: `[]` integer. The layer to write.
    k: `[T, K, D]` floating-point. Keys, already rotated; divided by their
      scale and cast to the pool's dtype. One of 8 bits has no infinity: what is
      beyond its largest number becomes that. NaN stays NaN.
    v: `[T, K, D]` floating-point. Values.
    block_ids: `[T]` int32. The rBlock of each token. Padding points at
      `NULL_BLOCK_ID`, whose content nobody reads, as often as it likes; ids
      outside of `[0, N)` are dropped. No other `(block_id, offset)` may occur
      twice.
    offsets: `[T]` int32 in `[0, P)`. The place of each token in its rBlock.
    k_scale: `[K]` float32. What each KV head's keys in the pool are multiplied
      by when they are read; None is 1. Only with `v_scale`.
    v_scale: `[K]` float32. Likewise for values.
    implementation: Name of the implementation; None is the first that covers
      the call.

  Returns:
    `[N, L, 2, K, P, D]`. The pool with the tokens in it.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the named implementation does not cover the call.
  """
  check_pool(kv_pool)
  check_layer(layer, kv_pool)
  check_scales(k_scale, v_scale, kv_pool)
  num_kv_heads, head_dim = kv_pool.shape[3], kv_pool.shape[5]
  require(k.ndim == 3, "k", "[T, K, D]", list(k.shape))
  num_tokens = k.shape[0]
  for name, x in (("k", k), ("v", v)):
    require_shape(name, x, "[T, K, D]", (num_tokens, num_kv_heads, head_dim))
    require_floating(name, x)
  for name, x in (("block_ids", block_ids), ("offsets", offsets)):
    require_shape(name, x, "[T]", (num_tokens,))
    require_int32(name, x)
  return IMPLEMENTATIONS.call(
    implementation,
    kv_pool,
    layer,
    k,
    v,
    block_ids,
    offsets,
    k_scale=k_scale,
    v_scale=v_scale,
  )
