"""append_kv as one XLA scatter."""

import jax
import jax.numpy as jnp

from pallas_kernels.pool_layout import Layer


def append_kv(
  kv_pool: jax.Array,
  layer: Layer,
  k: jax.Array,
  v: jax.Array,
  block_ids: jax.Array,
  offsets: jax.Array,
) -> jax.Array:
  """Writes keys and values; the contract is that of `api.append_kv`."""
  kv = jnp.stack([k, v], axis=1).astype(kv_pool.dtype)  # [T, 2, K, D]
  # JAX would read -1 as the last rBlock; without wrapping it is out of range,
  # and what is out of range is dropped.
  where = kv_pool.at[block_ids, layer, :, :, offsets]
  return where.set(kv, mode="drop", wrap_negative_indices=False)
