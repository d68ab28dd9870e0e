"""pack_blocks as one XLA gather, unpack_blocks as one XLA scatter."""

import jax
import jax.numpy as jnp


def pack_blocks(kv_pool: jax.Array, block_ids: jax.Array) -> jax.Array:
  """Copies rBlocks out; the contract is that of `api.pack_blocks`."""
  return kv_pool.at[block_ids].get(mode="clip", wrap_negative_indices=False)


def unpack_blocks(
  kv_pool: jax.Array, blocks: jax.Array, block_ids: jax.Array, valid: jax.Array
) -> jax.Array:
  """Copies rBlocks in; the contract is that of `api.unpack_blocks`."""
  num_blocks = kv_pool.shape[0]
  # An id past the end is dropped by the scatter.
  where = kv_pool.at[jnp.where(valid, block_ids, num_blocks)]
  return where.set(blocks, mode="drop", wrap_negative_indices=False)
