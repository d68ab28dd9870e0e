"""Micro-attention of many queries for Hopper GPUs, as a Mosaic GPU kernel.

After FlashAttention-3 (arXiv 2407.08608). A thread block has a tile of queries
of one KV head, and three warpgroups. One copies keys and values rBlock by
rBlock, with the tensor memory accelerator. The other two own 64 rows each, a
row being a query token of one head. They take turns: while one has the tensor
cores, the other one computes exponentials; and each also multiplies values by
its last weights while it computes the next ones. Where the group of query heads
is even, the two take different heads of the same tokens, and so need the same
KV.

A thread block passes one item of work after another, if it has several.
`prefill_plan` says which KV tiles a query tile passes and which of them need a
mask. Calls with too few tiles to fill the device split the KV of each; their
states are merged after.

Tensor cores want both operands of 16 bits, and a value of 8 bits would have to
be turned round in shared memory. So the rBlocks of a narrow pool are widened in
bounded numbers by XLA, once for all query tiles, and attended part by part.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_state import AttentionState, merge, merge_many
from pallas_kernels.interpreted import settled
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.mosaic_gpu_prefill_kernel import run
from pallas_kernels.micro_attention.prefill_geometry import (
  NUM_SMS,
  ROWS,
  Geometry,
  Tuning,
  default_tuning,
  heads_per_block,
)
from pallas_kernels.micro_attention.prefill_plan import PrefillPlan, make_plan
from pallas_kernels.pool_layout import (
  NULL_BLOCK_ID,
  Layer,
  as_numbers,
  number_dtype,
)

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
WIDENED_TOKENS = 16384  # KV tokens of 8 bits that are widened at once.


def prefill(
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
  tuning: Tuning | None = None,
  num_splits: int | None = None,
  widened_tokens: int = WIDENED_TOKENS,
  interpret: Any = None,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args:
    q: `[T, H, D]` bf16 or f16, as the pool if that has 16 bits.
    cu_seqlens: `[B + 1]` int32.
    q_positions: `[T]` int32.
    kv_pool: `[N, L, 2, K, P, D]`, `D` of `HEAD_DIMS`, `P` of `BLOCK_SIZES`; of
      8 bits float8_e4m3fn, or uint8 for its bits.
    layer: `[]` integer.
    tables: Of `B` rows.
    scale: Positive.
    max_query_tokens: Not used: rows of any length share tiles.
    sliding_window: How many positions a query sees; None is all.
    logit_soft_cap: As for `api.micro_attention`.
    k_scale: `[K]` float32, for a pool of 8 bits.
    v_scale: `[K]` float32.
    spared_multiprocessors: Not used: blocks of this kernel come and go.
    tuning: How to cut the kernel; None is the shipped one.
    num_splits: Parts that each tile's KV is cut into; None fills the device.
    widened_tokens: KV tokens of a pool of 8 bits that are widened at once.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `AttentionState` over `[T, H, D]`, float32.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  del spared_multiprocessors
  if number_dtype(kv_pool.dtype) == jnp.float8_e4m3fn:
    _require_covered("q", "dtype", q.dtype, DTYPES)
    state = _prefill_widened(
      q,
      cu_seqlens,
      q_positions,
      kv_pool,
      jnp.asarray(layer, jnp.int32),
      tables,
      None if k_scale is None else (k_scale, v_scale),
      scale=float(scale),
      max_query_tokens=max_query_tokens,
      sliding_window=sliding_window,
      logit_soft_cap=logit_soft_cap,
      tuning=tuning,
      num_splits=num_splits,
      widened_tokens=widened_tokens,
      interpret=interpret,
    )
    return settled(state, interpret)
  del max_query_tokens
  for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
    if x is not None:
      raise NotImplementedError(f"{name}: None; got an array.")
  num_tokens, num_q_heads, head_dim = q.shape
  num_kv_heads, block_size = kv_pool.shape[3:5]
  _require_covered("kv_pool", "dtype", kv_pool.dtype, DTYPES)
  _require_covered("q", "dtype", q.dtype, (kv_pool.dtype,))
  _require_covered("q", "head dim", head_dim, HEAD_DIMS)
  _require_covered("kv_pool", "block size", block_size, BLOCK_SIZES)
  if not scale > 0:
    raise NotImplementedError(f"scale: covers positive ones; got {scale}.")
  tuning = tuning or default_tuning(head_dim, block_size)
  num_heads = heads_per_block(num_q_heads // num_kv_heads)
  num_q_tiles = -(-num_tokens * num_heads // (2 * ROWS))
  if num_splits is None:
    num_items = num_q_tiles * (num_q_heads // num_heads)
    num_splits = _default_splits(
      num_items,
      tables.block_ids.shape[0] * block_size // tuning.kv_tile,
    )
  shape = Geometry(
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    block_size=block_size,
    num_q_tiles=num_q_tiles,
    num_splits=num_splits,
    scale=float(scale),
    sliding_window=sliding_window,
    logit_soft_cap=logit_soft_cap,
    tuning=tuning,
  )
  state = _micro_attention(
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    tables,
    shape=shape,
    interpret=interpret,
  )
  return settled(state, interpret)


@functools.partial(
  jax.jit,
  static_argnames=(
    "scale",
    "max_query_tokens",
    "sliding_window",
    "logit_soft_cap",
    "tuning",
    "num_splits",
    "widened_tokens",
    "interpret",
  ),
)
def _prefill_widened(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  scales: tuple[jax.Array, jax.Array] | None,
  *,
  widened_tokens: int,
  **options: Any,
) -> AttentionState:
  """Attends a pool of 8 bits, some rBlocks of all rows at a time.

  What rows hold counts as one list, and a part of it as one small pool. How
  many parts there are a device decides, unless one is enough for any rows.
  """
  num_rows, block_size = tables.starts.shape[0], kv_pool.shape[4]
  size = max(1, widened_tokens // block_size)
  size = min(size, tables.block_ids.shape[0])
  ends = jnp.cumsum(tables.counts)  # [B] in the list of all rows.
  begins = ends - tables.counts
  v_scale = None
  if scales is not None:
    k_scale, v_scale = (
      jnp.repeat(x, q.shape[1] // x.shape[0])[:, None] for x in scales
    )
    # As good on queries, which are rounded once more.
    q = (q.astype(jnp.float32) * k_scale).astype(q.dtype)

  def attend(part: jax.Array) -> AttentionState:
    first = part * size
    places = first + jnp.arange(size)
    rows = jnp.searchsorted(ends, places, side="right", method="compare_all")
    rows = jnp.minimum(rows, num_rows - 1)
    entries = tables.starts[rows] + places - begins[rows]
    ids = tables.block_ids.at[entries].get(mode="clip")
    ids = jnp.where(places < ends[-1], ids, NULL_BLOCK_ID).astype(jnp.int32)
    # Behind a null block, which nobody reads.
    read = jnp.concatenate([jnp.full(1, NULL_BLOCK_ID, jnp.int32), ids])
    kv = kv_pool.at[read, layer].get(mode="clip")
    starts = jnp.clip(begins - first, 0, size)
    held = BlockTables(
      block_ids=jnp.where(
        ids == NULL_BLOCK_ID, NULL_BLOCK_ID, 1 + jnp.arange(size)
      ).astype(jnp.int32),
      logical_ids=tables.logical_ids.at[entries].get(mode="clip"),
      starts=starts,
      counts=jnp.clip(ends - first, 0, size) - starts,
    )
    wide = as_numbers(kv).astype(q.dtype)[:, None]
    return prefill(q, cu_seqlens, q_positions, wide, 0, held, **options)

  state = attend(jnp.int32(0))
  # Rows may share entries, one row has none twice. A loop is made only where
  # it may turn: the host waits for what a device decides.
  if num_rows > 1 or size < tables.block_ids.shape[0]:
    state = jax.lax.fori_loop(
      1,
      -(-ends[-1] // size),
      lambda part, state: merge(state, attend(part)),
      state,
    )
  if v_scale is None:
    return state
  return state._replace(out=state.out * v_scale)


def _require_covered(
  name: str, what: str, value: object, covered: tuple[Any, ...]
) -> None:
  if value not in covered:
    raise NotImplementedError(
      f"{name}: covers a {what} of"
      f" {', '.join(str(getattr(x, '__name__', x)) for x in covered)};"
      f" got {value}."
    )


def _default_splits(num_items: int, most_steps: int) -> int:
  """Splits of KV so that every SM has an item, where KV is long enough.

  One more split than fits is worse than one less, so this rounds down; and a
  split of less than eight steps costs more in merging than it gains.
  """
  return max(1, min(NUM_SMS // num_items, most_steps // 8, 32))


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  *,
  shape: Geometry,
  interpret: Any,
) -> AttentionState:
  """Jitted so that the layers of a model share one trace."""
  plan = make_plan(
    cu_seqlens,
    q_positions,
    tables,
    block_size=shape.block_size,
    q_tile=shape.q_tile,
    kv_tile=shape.tuning.kv_tile,
    sliding_window=shape.sliding_window,
  )
  out, lse = _launch(q, plan, kv_pool, layer, tables, shape, interpret)
  num_tokens = q.shape[0]
  lse = jnp.swapaxes(lse, 1, 2)
  if out.shape[1] != num_tokens:
    out, lse = out[:, :num_tokens], lse[:, :num_tokens]
  if shape.num_splits == 1:
    return AttentionState(out=out[0], lse=lse[0])
  return merge_many(AttentionState(out=out, lse=lse))


def _launch(
  q: jax.Array,
  plan: PrefillPlan,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  shape: Geometry,
  interpret: Any,
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernel; gives `[R, T', H, D]` and `[R, H, T']` of `R` splits."""
  tuning, head_dim = shape.tuning, shape.head_dim
  num_splits, num_heads = shape.num_splits, shape.num_q_heads
  padded_tokens = shape.num_q_tiles * shape.q_tile
  # The hardware fills with zeros what is beyond q, but counts in eights.
  if q.shape[0] % 8 or interpret is not None:
    q = jnp.pad(q, ((0, padded_tokens - q.shape[0]), (0, 0), (0, 0)))
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

  def smem(*dims: int) -> Any:
    return plgpu.SMEM(dims, q.dtype, transforms=transforms)

  def copied(num_arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=tuning.stages)

  scratch = {
    "q_smem": smem(2, ROWS, head_dim),
    "k_smem": smem(tuning.stages, tuning.kv_tile, head_dim),
    "v_smem": smem(tuning.stages, tuning.kv_tile, head_dim),
    "q_full": plgpu.Barrier(num_barriers=2),
    "k_full": copied(shape.pieces),
    "v_full": copied(shape.pieces),
    "k_free": copied(2),
    "v_free": copied(2),
    "v_raw": plgpu.Barrier(num_arrivals=shape.pieces),
    "turn": plgpu.Barrier(num_barriers=2),
  }
  if tuning.is_interpretable:
    scratch["p_smem"] = smem(2, ROWS, tuning.kv_tile)
  of = jax.ShapeDtypeStruct
  return plgpu.kernel(
    functools.partial(run, shape=shape),
    out_type=(
      of((num_splits, padded_tokens, num_heads, head_dim), jnp.float32),
      of((num_splits, num_heads, padded_tokens), jnp.float32),
    ),
    grid=(min(shape.num_items, tuning.num_workers or shape.num_items),),
    grid_names=("worker",),
    num_threads=3,
    thread_name="warpgroup",
    scratch_types=scratch,
    kernel_name="micro_attention_prefill",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    interpret=interpret,
  )(
    plan.q_positions,
    plan.tiles,
    plan.segments,
    layer[None],
    tables.block_ids,
    tables.logical_ids,
    q,
    kv_pool,
  )
