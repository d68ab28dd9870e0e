"""The calls of copy_blocks, checked, whoever answers them."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.copy_blocks import mosaic_gpu, xla
from pallas_kernels.pool_layout import (
  check_pool,
  require,
  require_int32,
  require_shape,
)

__all__ = [
  "PACK_IMPLEMENTATIONS",
  "UNPACK_IMPLEMENTATIONS",
  "pack_blocks",
  "unpack_blocks",
]

PACK_IMPLEMENTATIONS = dispatch.Implementations(
  "pack_blocks",
  {
    "mosaic_gpu": dispatch.on_gpu(mosaic_gpu.pack),
    "xla": xla.pack_blocks,
  },
)
UNPACK_IMPLEMENTATIONS = dispatch.Implementations(
  "unpack_blocks",
  {
    "mosaic_gpu": dispatch.on_gpu(mosaic_gpu.unpack),
    "xla": xla.unpack_blocks,
  },
)


def pack_blocks(
  kv_pool: jax.Array,
  block_ids: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Copies whole rBlocks out of a pool into a staging buffer.

  Args:
    kv_pool: `[N, L, 2, K, P, D]` floating-point, or uint8 for the bits of
      float8_e4m3fn. All rBlocks of this device.
    block_ids: `[Q]` int32 in `[0, N)`. The rBlocks; padding points at
      `NULL_BLOCK_ID`.
    implementation: Name of the implementation; None is the first that covers
      the call.

  Returns:
    `[Q, L, 2, K, P, D]`. The rBlocks, in the order of `block_ids`.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the named implementation does not cover the call.
  """
  check_pool(kv_pool)
  require(block_ids.ndim == 1, "block_ids", "[Q]", list(block_ids.shape))
  require_int32("block_ids", block_ids)
  return PACK_IMPLEMENTATIONS.call(implementation, kv_pool, block_ids)


def unpack_blocks(
  kv_pool: jax.Array,
  blocks: jax.Array,
  block_ids: jax.Array,
  valid: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Copies rBlocks from a staging buffer into a pool.

  In place where the caller's program donates the pool.

  Args:
    kv_pool: `[N, L, 2, K, P, D]` floating-point, or uint8 for the bits of
      float8_e4m3fn. All rBlocks of this device.
    blocks: `[Q, L, 2, K, P, D]`, of the pool's dtype. What `pack_blocks` gave.
    block_ids: `[Q]` int32. Where each one goes; no valid one occurs twice.
    valid: `[Q]` bool. Which ones to write; the others are dropped, whatever
      their ids.
    implementation: Name of the implementation; None is the first that covers
      the call.

  Returns:
    `[N, L, 2, K, P, D]`. The pool with the rBlocks in it.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the named implementation does not cover the call.
  """
  check_pool(kv_pool)
  require(block_ids.ndim == 1, "block_ids", "[Q]", list(block_ids.shape))
  require_int32("block_ids", block_ids)
  require_shape(
    "blocks",
    blocks,
    "[Q, L, 2, K, P, D]",
    block_ids.shape + kv_pool.shape[1:],
  )
  rule = f"{kv_pool.dtype}, as kv_pool"
  require(blocks.dtype == kv_pool.dtype, "blocks", rule, blocks.dtype)
  require_shape("valid", valid, "[Q]", block_ids.shape)
  require(valid.dtype == jnp.bool_, "valid", "bool", valid.dtype)
  return UNPACK_IMPLEMENTATIONS.call(
    implementation, kv_pool, blocks, block_ids, valid
  )
