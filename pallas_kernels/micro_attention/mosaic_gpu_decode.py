"""Ragged decode micro-attention on Hopper, bound by memory bandwidth.

One block of threads per multiprocessor: a copy warpgroup streams tiles of keys
and values through a ring in shared memory, a compute warpgroup consumes them.
`decode_plan` says which tiles. Of tiles of 8 bits, keys are widened in
registers and values by a warpgroup of their own, and two compute warpgroups
take turns.

The operands are swapped, so that the tokens of a tile, not the few queries,
fill the 64 rows of a tensor-core instruction:

  S^T [tokens, columns] = K [tokens, D] Q^T
  O^T [D, columns] += V^T [D, tokens] P^T

with one column for each query token and query head of a KV head. Exponents are
base 2 until the end; empty sums have the finite top -1e30.

Items that several workers share are merged here too: every worker but the
first writes its part to global memory and signals the first, which waits for
them at its own end. Later workers have lower block numbers, and blocks start in
order, so that who waits never keeps those from starting for whom it waits.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_state import AttentionState
from pallas_kernels.interpreted import settled
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.decode_geometry import (
  MULTIPROCESSORS,
  REDUCTION_NUMBERS,
  Geometry,
  Tuning,
  default_tuning,
)
from pallas_kernels.micro_attention.decode_plan import in_reach, make_plan
from pallas_kernels.micro_attention.mosaic_gpu_decode_kernel import run
from pallas_kernels.micro_attention.mosaic_gpu_decode_walk import Refs, Ring
from pallas_kernels.pool_layout import Layer, as_numbers

_MAX_QUERY_TOKENS = 8
_Q_DIVISOR = 256.0  # Of bfloat16 queries that become float16.
_OPERANDS = (
  "workers",
  "rows",
  "has_entries",
  "q_positions",
  "block_ids",
  "logical_ids",
  "layer",
  "q",
  "pool",
)  # Of `Refs`, in the order in which the kernel gets them.
_RESULTS = ("out", "lse", "parts", "part_sums")
_OPTIONAL = (
  "k_scale",
  "v_scale",
  "narrow_v",
  "handed",
  "handed_sums",
  "reductions",
  "wide_k",
)


def decode(
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
  interpret: Any = None,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args:
    q: As for `api.micro_attention`, and so are all others but the last two.
    cu_seqlens: `[B + 1]` int32.
    q_positions: `[T]` int32.
    kv_pool: `[N, L, 2, K, P, D]`.
    layer: `[]` integer.
    tables: Of `B` rows.
    scale: Multiplier on the logits.
    max_query_tokens: Most query tokens of a row.
    sliding_window: Positions that a query sees.
    logit_soft_cap: Soft cap on the logits.
    k_scale: `[K]` float32.
    v_scale: `[K]` float32.
    spared_multiprocessors: Less than there are.
    tuning: Layout on the device; None is the shipped one, but for those spared.
    interpret: `plgpu.InterpretGPUParams` to interpret the kernel on a CPU.

  Returns:
    `AttentionState` over `[T, H, D]`.

  Raises:
    NotImplementedError: If the kernel does not cover the call.
  """
  kv_pool = as_numbers(kv_pool)
  _check_covered(q, kv_pool, max_query_tokens, spared_multiprocessors)
  is_narrow = kv_pool.dtype != q.dtype
  if is_narrow and q.dtype == jnp.bfloat16:
    # The hardware converts 8 bits to float16 only, and exactly. Queries beyond
    # 1.6e7 become that; steps of 2**-16 near 0 move no logit.
    largest = float(jnp.finfo(jnp.float16).max)
    q = jnp.clip(q.astype(jnp.float32) / _Q_DIVISOR, -largest, largest)
    q = q.astype(jnp.float16)
    scale *= _Q_DIVISOR
  num_q_heads, head_dim = q.shape[1:]
  num_layers, _, num_kv_heads, block_size = kv_pool.shape[1:5]
  max_columns = _max_columns(head_dim, is_narrow=is_narrow)
  parts, group = _cut_group(num_q_heads // num_kv_heads, max_columns)
  head_columns = _head_columns(group)
  tokens_per_item = min(max_query_tokens, max_columns // head_columns)
  geometry = Geometry(
    group=group,
    parts=parts,
    head_columns=head_columns,
    tokens_per_item=tokens_per_item,
    chunks=-(-max_query_tokens // tokens_per_item),
    num_q_heads=num_kv_heads * parts * group,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    block_size=block_size,
    head_dim=head_dim,
    dtype=jnp.dtype(q.dtype),
    is_narrow=is_narrow,
    scale=float(scale),
    sliding_window=None if sliding_window is None else int(sliding_window),
    soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
    tuning=tuning
    or default_tuning(
      head_dim,
      tokens_per_item * head_columns,
      is_narrow=is_narrow,
      num_spared=spared_multiprocessors,
    ),
    interpret=interpret is not None,
  )
  state = _decode(
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    tables,
    None if k_scale is None else (k_scale, v_scale),
    geometry=geometry,
    interpret=interpret,
  )
  return settled(state, interpret)


def _check_covered(
  q: jax.Array,
  kv_pool: jax.Array,
  max_query_tokens: int,
  spared_multiprocessors: int,
) -> None:
  """Raises NotImplementedError for what the kernel cannot do."""
  block_size, head_dim = kv_pool.shape[4:]
  dtypes = (jnp.bfloat16, jnp.float16)
  covers = {
    f"q: bfloat16 or float16; got {q.dtype}": q.dtype in dtypes,
    f"kv_pool: the dtype of q, or float8_e4m3fn; got {kv_pool.dtype}": (
      kv_pool.dtype in (q.dtype, jnp.float8_e4m3fn)
    ),
    f"kv_pool: D of 64, 128 or 256; got {head_dim}": head_dim in (64, 128, 256),
    f"kv_pool: P of 16, 32, 64 or 128; got {block_size}": (
      block_size in (16, 32, 64, 128)
    ),
    f"max_query_tokens: at most {_MAX_QUERY_TOKENS}; got {max_query_tokens}": (
      max_query_tokens <= _MAX_QUERY_TOKENS
    ),
    f"spared_multiprocessors: less than {MULTIPROCESSORS}; got"
    f" {spared_multiprocessors}": spared_multiprocessors < MULTIPROCESSORS,
  }
  for rule, is_covered in covers.items():
    if not is_covered:
      raise NotImplementedError(f"{rule}.")


@functools.partial(jax.jit, static_argnames=("geometry", "interpret"))
def _decode(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  scales: tuple[jax.Array, jax.Array] | None,
  *,
  geometry: Geometry,
  interpret: Any,
) -> AttentionState:
  """Jitted so that the layers of a model share one trace."""
  g, tuning = geometry, geometry.tuning
  num_tokens, num_q_heads = q.shape[:2]
  filler = (g.num_q_heads - num_q_heads) // g.num_kv_heads
  if filler:
    q = q.reshape(num_tokens, g.num_kv_heads, -1, g.head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, filler), (0, 0)))
    q = q.reshape(num_tokens, g.num_q_heads, g.head_dim)
  if g.sliding_window is not None:
    tables = in_reach(
      cu_seqlens,
      q_positions,
      tables,
      block_size=g.block_size,
      max_query_tokens=g.tokens_per_item * g.chunks,
      sliding_window=g.sliding_window,
    )
  plan = make_plan(
    cu_seqlens,
    tables,
    num_workers=tuning.num_workers,
    items_per_row=g.items_per_row,
    block_size=g.block_size,
    tile_tokens=tuning.tile_tokens,
  )
  last_group = (g.num_q_heads - g.group) // 8 * 8
  missing = last_group + g.head_columns - g.num_q_heads
  if missing > 0:
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
  token = jnp.arange(num_tokens)
  of_row = (cu_seqlens[:-1, None] <= token) & (token < cu_seqlens[1:, None])
  has_entries = jnp.any(of_row & (tables.counts[:, None] > 0), axis=0)
  # Empty states are written by 128 threads with two numbers each.
  out_heads = -(-g.num_q_heads * g.head_dim // 256) * 256 // g.head_dim
  float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  stages, tile = tuning.num_stages, tuning.tile_tokens
  kv_ring = functools.partial(_ring, shape=(tile, g.head_dim))
  from_copies = functools.partial(
    kv_ring, kv_pool.dtype, stages, num_arrivals=g.copies
  )
  rings = {
    "queries": _ring(
      g.dtype,
      2,
      (g.columns, g.head_dim),
      num_arrivals=g.tokens_per_item,
      num_users=g.attenders,
    ),
    "k": from_copies(),
    "v": from_copies(),
  }
  more_smem = {}
  if g.is_narrow:
    rings["narrow_v"] = rings["v"]
    rings["v"] = kv_ring(g.dtype, tuning.num_wide_v)
    rings["handed"] = Ring(
      smem=plgpu.SMEM((1, g.head_dim, g.columns), jnp.float32),
      full=plgpu.Barrier(num_barriers=1),
      empty=plgpu.Barrier(num_barriers=1),
      size=1,
    )
    more_smem["handed_sums"] = plgpu.SMEM((2, g.columns), jnp.float32)
    if g.interpret:
      more_smem["wide_k"] = kv_ring(g.dtype, g.attenders).smem
    else:
      more_smem["reductions"] = plgpu.SMEM(
        (g.attenders, REDUCTION_NUMBERS), jnp.float32
      )
  scratch = {
    **more_smem,
    "p_smem": plgpu.SMEM(
      (g.attenders, g.columns, tile),
      g.dtype,
      transforms=_swizzled(g.dtype, tile),
    ),
    "out_smem": plgpu.SMEM((g.columns, g.head_dim), jnp.float32),
    "lse_smem": plgpu.SMEM((g.columns,), jnp.float32),
    "first_smem": plgpu.SMEM((stages * g.copies,), jnp.int32),
    **{
      f"{name}.{part}": getattr(ring, part)
      for name, ring in rings.items()
      for part in ("smem", "full", "empty")
    },
  }
  workers = tuning.num_workers
  scale_names = ("k_scale", "v_scale") if scales else ()
  names = (*_OPERANDS, *scale_names, *_RESULTS)

  def body(*args: Any, **refs: Any) -> None:
    # Scratch semaphores would be every block's own.
    merged = None
    if not g.interpret:
      merged = pl.get_global(plgpu.SemaphoreType.REGULAR((workers,)))
    operands = dict.fromkeys(_OPTIONAL)
    operands |= zip(names, args, strict=True)
    for name, ring in rings.items():
      parts = [refs.pop(f"{name}.{part}") for part in ("smem", "full", "empty")]
      operands[name] = Ring(*parts, size=ring.size)
    run(g, Refs(**operands | refs, merged=merged))

  out, lse, *_ = plgpu.kernel(
    body,
    out_type=(
      float32((num_tokens, out_heads, g.head_dim)),
      float32((num_tokens, g.num_q_heads)),
      float32((workers, g.head_dim, g.columns)),
      float32((workers, 2, g.columns)),
    ),
    scratch_types=scratch,
    grid=(workers,),
    grid_names=("block",),
    num_threads=4 if g.is_narrow else 2,
    thread_name="warpgroup",
    kernel_name="micro_attention_decode",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      # Every hand-over in shared memory has its own barrier: a reduction over
      # columns, `commit_smem`, or one of `Refs`.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    interpret=interpret,
  )(
    plan.workers,
    plan.rows,
    has_entries.astype(jnp.int32),
    q_positions,
    tables.block_ids,
    tables.logical_ids,
    layer.reshape(1),
    q,
    kv_pool.reshape(-1, g.block_size, g.head_dim),
    *(scales or ()),
  )
  if out_heads > g.num_q_heads:
    out = out[:, : g.num_q_heads]
  if filler:
    out, lse = (
      x.reshape(num_tokens, g.num_kv_heads, -1, *x.shape[2:])[:, :, :-filler]
      for x in (out, lse)
    )
    out = out.reshape(num_tokens, num_q_heads, g.head_dim)
    lse = lse.reshape(num_tokens, num_q_heads)
  return AttentionState(out=out, lse=lse)


def _ring(
  dtype: Any,
  size: int,
  shape: tuple[int, int],
  *,
  num_arrivals: int = 1,
  num_users: int = 1,
) -> Ring:
  """Scratch types of a ring of matrices, whose copies and users arrive."""
  return Ring(
    smem=plgpu.SMEM(
      (size, *shape), dtype, transforms=_swizzled(dtype, shape[1])
    ),
    full=plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=size),
    empty=plgpu.Barrier(num_arrivals=num_users, num_barriers=size),
    size=size,
  )


def _swizzled(dtype: Any, columns: int) -> tuple[Any, Any]:
  """How tensor cores want operands: 8 rows of up to 128 bytes, swizzled."""
  itemsize = jnp.dtype(dtype).itemsize
  row_bytes = min(128, columns * itemsize)
  return (
    plgpu.TilingTransform((8, row_bytes // itemsize)),
    plgpu.SwizzleTransform(row_bytes),
  )


def _cut_group(group: int, max_columns: int) -> tuple[int, int]:
  """Parts of a group of query heads, and heads of each to fit the columns.

  A group that does not fit as it is becomes the fewest equal parts of whole
  eights; more heads than the group has are to be filled up.
  """
  if _head_columns(group) <= max_columns:
    return 1, group
  parts = -(-group // max_columns)
  return parts, -(-group // (8 * parts)) * 8


def _head_columns(group: int) -> int:
  """Columns for the query heads of a KV head, wherever in an eight they lie."""
  return -(-(group + 8 - math.gcd(group, 8)) // 8) * 8


def _max_columns(head_dim: int, *, is_narrow: bool) -> int:
  """Columns of one item: more would spill registers."""
  if head_dim <= 128:
    return 32
  return 8 if is_narrow else 16
