"""Micro-attention as a specification: every query against every entry.

Takes time and memory in O(T * E * P), so it is for small cases only.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.pool_layout import NULL_BLOCK_ID, Layer, as_numbers


def micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: Layer,
  tables: BlockTables,
  *,
  scale: float,
  max_query_tokens: int,
  sliding_window: int | None = None,
  logit_soft_cap: float | None = None,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  spared_multiprocessors: int = 0,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args, results and errors are those of `api.micro_attention`. Computes in
  float32, or in float64 if `q` is float64.
  """
  del max_query_tokens, spared_multiprocessors
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  num_kv_heads, block_size = kv_pool.shape[3:5]
  num_tokens, num_q_heads, head_dim = q.shape
  group = num_q_heads // num_kv_heads

  # Which row each query and each entry belong to.
  t = jnp.arange(num_tokens)
  e = jnp.arange(tables.block_ids.shape[0])[:, None]
  query_of = (cu_seqlens[:-1, None] <= t) & (t < cu_seqlens[1:, None])  # [B, T]
  ends = tables.starts + tables.counts
  entry_of = (tables.starts <= e) & (e < ends)  # [E, B]
  same_row = jnp.any(entry_of[:, :, None] & query_of, axis=1)  # [E, T]
  holds_kv = tables.block_ids != NULL_BLOCK_ID  # [E]

  # Which tokens each query sees.
  kv_positions = (
    tables.logical_ids[:, None] * block_size + jnp.arange(block_size)
  )[:, :, None]  # [E, P, 1]
  sees = kv_positions <= q_positions
  if sliding_window is not None:
    sees &= kv_positions > q_positions - sliding_window
  sees &= (same_row & holds_kv[:, None])[:, None, :]  # [E, P, T]

  # Tokens that nobody sees may be NaN, and 0 * NaN is NaN.
  seen_by_any = jnp.any(sees, axis=2)[:, None, :, None]
  kv = as_numbers(kv_pool[tables.block_ids, layer])  # [E, 2, K, P, D]
  kv = kv.astype(dtype)
  k, v = (jnp.where(seen_by_any, kv[:, i], 0) for i in range(2))
  if k_scale is not None:
    k, v = (x * s[:, None, None] for x, s in ((k, k_scale), (v, v_scale)))

  q = q.reshape(num_tokens, num_kv_heads, group, head_dim).astype(dtype)
  exact = jax.lax.Precision.HIGHEST
  logits = scale * jnp.einsum("tkgd,ekpd->tkgep", q, k, precision=exact)
  if logit_soft_cap is not None:
    logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
  sees = sees.transpose(2, 0, 1)[:, None, None]  # [T, 1, 1, E, P]
  logits = jnp.where(sees, logits, -jnp.inf)

  top = jnp.max(logits, axis=(-2, -1), keepdims=True)
  is_empty = top == -jnp.inf
  weights = jnp.exp(logits - jnp.where(is_empty, 0, top))
  total = jnp.sum(weights, axis=(-2, -1), keepdims=True)
  weights = jnp.where(is_empty, 0, weights / total)
  out = jnp.einsum("tkgep,ekpd->tkgd", weights, v, precision=exact)
  lse = jnp.where(is_empty, -jnp.inf, top + jnp.log(total))
  return AttentionState(
    out=out.reshape(num_tokens, num_q_heads, head_dim),
    lse=lse.reshape(num_tokens, num_q_heads),
  )
