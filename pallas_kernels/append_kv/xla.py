"""append_kv as one XLA scatter."""

import jax
import jax.numpy as jnp

from pallas_kernels.pool_layout import Layer, as_held, number_dtype


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
) -> jax.Array:
  """Writes keys and values; the contract is that of `api.append_kv`."""
  dtype = number_dtype(kv_pool.dtype)
  kv = jnp.stack([k, v], axis=1)  # [T, 2, K, D]
  if k_scale is not None:
    kv = kv.astype(jnp.float32) / jnp.stack([k_scale, v_scale])[:, :, None]
  if dtype.itemsize == 1:  # Casts would give NaN, not the largest.
    largest = float(jnp.finfo(dtype).max)
    kv = jnp.clip(kv, -largest, largest)
  kv = as_held(kv.astype(dtype), kv_pool.dtype)
  # JAX would read -1 as the last rBlock; without wrapping it is out of range,
  # and what is out of range is dropped.
  where = kv_pool.at[block_ids, layer, :, :, offsets]
  return where.set(kv, mode="drop", wrap_negative_indices=False)
