"""Ragged decode micro-attention on Hopper, bound by memory bandwidth.

One block of threads per multiprocessor: a copy warpgroup streams tiles of keys
and values through a ring in shared memory, a compute warpgroup consumes them.
`decode_plan` says which tiles.

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
from pallas_kernels.dispatch import OtherBackendError
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.decode_geometry import (
  Geometry,
  Tuning,
  default_tuning,
)
from pallas_kernels.micro_attention.decode_plan import make_plan
from pallas_kernels.micro_attention.mosaic_gpu_decode_kernel import Refs, run
from pallas_kernels.pool_layout import Layer

_MAX_COLUMNS = 32  # Of one item, at D of 128.
_MAX_QUERY_TOKENS = 8
_OPERANDS = (
  "workers",
  "rows",
  "bounds",
  "q_positions",
  "block_ids",
  "logical_ids",
  "layer",
  "q",
  "pool",
  "out",
  "lse",
  "parts",
  "part_sums",
)  # Of `Refs`, in the order in which the kernel gets them.


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
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args, results and errors are those of `api.micro_attention`.
  """
  # Which kernel a trace takes is decided while tracing, for the backend that
  # the process would run on. Compiling for another platform asks `decode`.
  backend = jax.default_backend()
  if backend != "gpu":
    raise OtherBackendError(f"default backend: a GPU kernel; got {backend}.")
  return decode(
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
  tuning: Tuning | None = None,
  interpret: Any = None,
) -> AttentionState:
  """As `micro_attention`, on whatever platform the caller compiles for.

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
    tuning: Layout on the device; None is the shipped one.
    interpret: `plgpu.InterpretGPUParams` to interpret the kernel on a CPU.

  Returns:
    `AttentionState` over `[T, H, D]`.

  Raises:
    NotImplementedError: If the kernel does not cover the call.
  """
  _check_covered(q, kv_pool, max_query_tokens)
  num_q_heads, head_dim = q.shape[1:]
  num_layers, _, num_kv_heads, block_size = kv_pool.shape[1:5]
  group = num_q_heads // num_kv_heads
  head_columns = _head_columns(group)
  most_tokens = _max_columns(head_dim) // head_columns
  tokens_per_item = min(max_query_tokens, most_tokens)
  geometry = Geometry(
    group=group,
    head_columns=head_columns,
    tokens_per_item=tokens_per_item,
    items_per_head=-(-max_query_tokens // tokens_per_item),
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    block_size=block_size,
    head_dim=head_dim,
    dtype=jnp.dtype(q.dtype),
    scale=float(scale),
    sliding_window=None if sliding_window is None else int(sliding_window),
    soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
    tuning=tuning or default_tuning(head_dim, tokens_per_item * head_columns),
    interpret=interpret is not None,
  )
  return _decode(
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    tables,
    geometry=geometry,
    interpret=interpret,
  )


def _check_covered(
  q: jax.Array, kv_pool: jax.Array, max_query_tokens: int
) -> None:
  """Raises NotImplementedError for what the kernel cannot do."""
  block_size, head_dim = kv_pool.shape[4:]
  group = q.shape[1] // kv_pool.shape[3]
  dtypes = (jnp.bfloat16, jnp.float16)
  covers = {
    f"q: bfloat16 or float16; got {q.dtype}": q.dtype in dtypes,
    f"kv_pool: the dtype of q; got {kv_pool.dtype}": kv_pool.dtype == q.dtype,
    f"kv_pool: D of 64, 128 or 256; got {head_dim}": head_dim in (64, 128, 256),
    f"kv_pool: P of 16, 32, 64 or 128; got {block_size}": (
      block_size in (16, 32, 64, 128)
    ),
    f"max_query_tokens: at most {_MAX_QUERY_TOKENS}; got {max_query_tokens}": (
      max_query_tokens <= _MAX_QUERY_TOKENS
    ),
    f"q: at most 32 query heads to a KV head, or 16 at D of 256; got {group}": (
      _head_columns(group) <= _max_columns(head_dim)
    ),
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
  *,
  geometry: Geometry,
  interpret: Any,
) -> AttentionState:
  """Jitted so that the layers of a model share one trace."""
  g, tuning = geometry, geometry.tuning
  num_tokens = q.shape[0]
  plan = make_plan(
    cu_seqlens,
    tables,
    num_workers=tuning.num_workers,
    items_per_row=g.num_kv_heads * g.items_per_head,
    block_size=g.block_size,
    tile_tokens=tuning.tile_tokens,
  )
  last_group = (g.num_q_heads - g.group) // 8 * 8
  missing = last_group + g.head_columns - g.num_q_heads
  if missing > 0:
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
  # The first row is where queries of no row begin.
  bounds = jnp.stack([cu_seqlens[0], cu_seqlens[-1]])
  float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  stages, tile = tuning.num_stages, tuning.tile_tokens
  barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
  scratch = {
    "k_smem": plgpu.SMEM(
      (stages, tile, g.head_dim), g.dtype, transforms=swizzled
    ),
    "v_smem": plgpu.SMEM(
      (stages, tile, g.head_dim), g.dtype, transforms=swizzled
    ),
    "q_smem": plgpu.SMEM(
      (2, g.columns, g.head_dim), g.dtype, transforms=swizzled
    ),
    "p_smem": plgpu.SMEM((g.columns, tile), g.dtype, transforms=swizzled),
    "out_smem": plgpu.SMEM((g.columns, g.head_dim), jnp.float32),
    "lse_smem": plgpu.SMEM((g.columns,), jnp.float32),
    "first_smem": plgpu.SMEM((stages * g.copies,), jnp.int32),
    "k_full": barrier(num_arrivals=g.copies),
    "v_full": barrier(num_arrivals=g.copies),
    "k_empty": barrier(),
    "v_empty": barrier(),
    "q_full": plgpu.Barrier(num_arrivals=g.tokens_per_item, num_barriers=2),
    "q_empty": plgpu.Barrier(num_barriers=2),
  }
  workers = tuning.num_workers

  def body(*args: Any, **scratch_refs: Any) -> None:
    # Scratch semaphores would be every block's own.
    merged = None
    if not g.interpret:
      merged = pl.get_global(plgpu.SemaphoreType.REGULAR((workers,)))
    operands = dict(zip(_OPERANDS, args, strict=True))
    run(g, Refs(**operands, **scratch_refs, merged=merged))

  out, lse, *_ = plgpu.kernel(
    body,
    out_type=(
      float32((num_tokens, g.num_q_heads, g.head_dim)),
      float32((num_tokens, g.num_q_heads)),
      float32((workers, g.head_dim, g.columns)),
      float32((workers, 2, g.columns)),
    ),
    scratch_types=scratch,
    grid=(workers,),
    grid_names=("block",),
    num_threads=2,
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
    bounds,
    q_positions,
    tables.block_ids,
    tables.logical_ids,
    layer.reshape(1),
    q,
    kv_pool.reshape(-1, g.block_size, g.head_dim),
  )
  return AttentionState(out=out, lse=lse)


def _head_columns(group: int) -> int:
  """Columns for the query heads of a KV head, wherever in an eight they lie."""
  return -(-(group + 8 - math.gcd(group, 8)) // 8) * 8


def _max_columns(head_dim: int) -> int:
  """Columns of one item: more would spill registers."""
  return _MAX_COLUMNS * 128 // max(head_dim, 128)
