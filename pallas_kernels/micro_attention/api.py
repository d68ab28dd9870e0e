"""The call of micro-attention, checked, whoever answers it."""

import math
import numbers

import jax

from pallas_kernels import dispatch
from pallas_kernels.attention_state import AttentionState, empty_state
from pallas_kernels.micro_attention import mosaic_gpu, reference, xla
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.mosaic_gpu_decode import decode
from pallas_kernels.micro_attention.mosaic_gpu_prefill import prefill
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

__all__ = ["IMPLEMENTATIONS", "BlockTables", "micro_attention"]

IMPLEMENTATIONS = dispatch.Implementations(
  "micro_attention",
  {
    "mosaic_gpu": dispatch.on_gpu(mosaic_gpu.micro_attention),
    "xla": xla.micro_attention,
    "reference": reference.micro_attention,
  },
  by_request={
    "mosaic_gpu_decode": dispatch.on_gpu(decode),
    "mosaic_gpu_prefill": dispatch.on_gpu(prefill),
  },
)


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
  implementation: str | None = None,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  One rule decides what a query sees. Token `o` of entry `e` of its row has
  position `p = tables.logical_ids[e] * P + o`, and query `t` sees it if and
  only if

    p <= q_positions[t]   and   p > q_positions[t] - sliding_window.

  That is causality, partly filled last rBlocks and sliding windows at once.
  A token out of a row's reach, which no position from its first to its last
  query's would see, may hold anything, even NaN. Query head `h` reads KV head
  `h // (H // K)`. Logits and sums are float32.

  Args:
    q: `[T, H, D]` floating-point. Query tokens of all rows, one row after
      another, already rotated.
    cu_seqlens: `[B + 1]` int32, not decreasing. Where each row's queries start
      in `q`; queries outside of every row are padding.
    q_positions: `[T]` int32. Position of each query in its sequence; -1 is
      padding.
    kv_pool: `[N, L, 2, K, P, D]` floating-point, or uint8 for the bits of
      float8_e4m3fn. All rBlocks of this device.
    layer: `[]` integer. The layer to read.
    tables: The rBlocks of each of the `B` rows.
    scale: Multiplier on the logits, usually `D ** -0.5`.
    max_query_tokens: Most query tokens that any row has. A row with more is a
      wrong call that the arrays' shapes cannot show: its result is undefined.
    sliding_window: How many positions a query sees, its own included; None is
      all.
    logit_soft_cap: `c` in `c * tanh(logit / c)`, after scaling; None is none.
    k_scale: `[K]` float32. What each KV head's keys in the pool are multiplied
      by, for pools of 8 bits; None is 1. Only with `v_scale`.
    v_scale: `[K]` float32. Likewise for values.
    spared_multiprocessors: How many a kernel that would take each of them for
      as long as it runs leaves to what runs beside it, as a collective.
    implementation: Name of the implementation, which then never falls back;
      None is the first that covers the call.

  Returns:
    `AttentionState` over `[T, H, D]`, float32. Queries that see nothing, and
    padding, are `EMPTY`.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the named implementation does not cover the call.
  """
  _check_queries(q, cu_seqlens, q_positions)
  check_pool(kv_pool)
  check_layer(layer, kv_pool)
  _check_heads(q, kv_pool)
  _check_tables(tables, num_rows=cu_seqlens.shape[0] - 1)
  _check_options(scale, max_query_tokens, sliding_window, logit_soft_cap)
  _check_spared(spared_multiprocessors)
  check_scales(k_scale, v_scale, kv_pool)
  if 0 in (q.shape[0], tables.starts.shape[0], tables.block_ids.shape[0]):
    return empty_state(q.shape)
  return IMPLEMENTATIONS.call(
    implementation,
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    layer,
    tables,
    scale=scale,
    max_query_tokens=max_query_tokens,
    sliding_window=sliding_window,
    logit_soft_cap=logit_soft_cap,
    k_scale=k_scale,
    v_scale=v_scale,
    spared_multiprocessors=spared_multiprocessors,
  )


def _check_queries(
  q: jax.Array, cu_seqlens: jax.Array, q_positions: jax.Array
) -> None:
  require(q.ndim == 3, "q", "[T, H, D]", list(q.shape))
  require(0 not in q.shape[1:], "q", "[T, H, D], H, D >= 1", list(q.shape))
  require_floating("q", q)
  require_shape("q_positions", q_positions, "[T]", q.shape[:1])
  require_int32("q_positions", q_positions)
  require(
    cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 1,
    "cu_seqlens",
    "[B + 1]",
    list(cu_seqlens.shape),
  )
  require_int32("cu_seqlens", cu_seqlens)


def _check_heads(q: jax.Array, kv_pool: jax.Array) -> None:
  num_q_heads, head_dim = q.shape[1:]
  num_kv_heads, pool_head_dim = kv_pool.shape[3], kv_pool.shape[5]
  rule = f"D of kv_pool = {pool_head_dim}"
  require(head_dim == pool_head_dim, "D of q", rule, head_dim)
  rule = f"a multiple of K of kv_pool = {num_kv_heads}"
  require(num_q_heads % num_kv_heads == 0, "H of q", rule, num_q_heads)


def _check_tables(tables: BlockTables, *, num_rows: int) -> None:
  for name, x in tables._asdict().items():
    require(x.ndim == 1, f"tables.{name}", "one-dimensional", list(x.shape))
    require_int32(f"tables.{name}", x)
  require_shape(
    "tables.logical_ids", tables.logical_ids, "[E]", tables.block_ids.shape
  )
  for name in ("starts", "counts"):
    require_shape(f"tables.{name}", getattr(tables, name), "[B]", (num_rows,))


def _check_options(
  scale: float,
  max_query_tokens: int,
  sliding_window: int | None,
  logit_soft_cap: float | None,
) -> None:
  is_finite = isinstance(scale, numbers.Real) and math.isfinite(scale)
  require(is_finite, "scale", "a finite Python number", scale)
  _require_positive_int("max_query_tokens", max_query_tokens)
  if sliding_window is not None:
    _require_positive_int("sliding_window", sliding_window)
  if logit_soft_cap is not None:
    require(
      isinstance(logit_soft_cap, numbers.Real)
      and math.isfinite(logit_soft_cap)
      and logit_soft_cap > 0,
      "logit_soft_cap",
      "None or a positive finite Python number",
      logit_soft_cap,
    )


def _check_spared(spared_multiprocessors: int) -> None:
  require(
    isinstance(spared_multiprocessors, numbers.Integral)
    and spared_multiprocessors >= 0,
    "spared_multiprocessors",
    "a Python int, at least 0",
    spared_multiprocessors,
  )


def _require_positive_int(name: str, value: object) -> None:
  require(
    isinstance(value, numbers.Integral) and 1 <= value < 2**31,
    name,
    "a Python int in [1, 2**31)",
    value,
  )
