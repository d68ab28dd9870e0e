"""Micro-attention for Hopper GPUs: the kernel that suits the call.

The decode kernel reads KV once for a few query tokens of each row, at the speed
of memory. The prefill kernel gives each row a tile of 64 or more queries,
however few it has, at the speed of the tensor cores. So few queries go to the
one and many to the other (the adaptive kernels of arXiv 2401.02669); where the
border lies was measured, and is estimated where it was not.
"""

import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.mosaic_gpu_decode import decode
from pallas_kernels.micro_attention.mosaic_gpu_prefill import prefill
from pallas_kernels.pool_layout import Layer

_READ_BYTES_PER_S = 4.2e12  # By the decode kernel, of an H200.
_FLOP_PER_S = 600e12  # Of the prefill kernel.
_MEASURED_GROUP, _MEASURED_HEAD_DIM = 4, 128
_MEASURED = {
  (1, 1024): 8,
  (1, 16384): 2,
  (1, 262144): 4,
  (16, 1024): 4,
  (16, 16384): 4,
  (128, 1024): 4,
}
"""Rows and context: the most query tokens that the decode kernel was faster at.

Of 1, 2, 4 and 8, on an H200; see `experiments/choice_bench.py`.
"""
_MOST_NARROW = 8
"""The same for pools of 8 bits: as many as the decode kernel takes.

With 2, 4 and 8 tokens it was 1.7 to 9 times as fast at 1 x 16K and 16 x 16K.
"""
_NEAR = 4.0  # As many times more or fewer rows or tokens than measured.


class Work(NamedTuple):
  """What decides which kernel is faster, all of it static.

  Attributes:
    query_tokens: Most query tokens of a row.
    rows: `B`.
    context: KV tokens of a row, as many as tables and windows have room for.
    num_q_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    is_narrow: Whether the pool has 8 bits, which prefill must widen first.
  """

  query_tokens: int
  rows: int
  context: int
  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  is_narrow: bool


def micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: Layer,
  tables: BlockTables,
  *,
  max_query_tokens: int,
  sliding_window: int | None = None,
  **options: Any,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args, results and errors are those of `api.micro_attention`.
  """
  rows = cu_seqlens.shape[0] - 1
  query_tokens = min(max_query_tokens, q.shape[0])
  context = -(-tables.block_ids.shape[0] * kv_pool.shape[4] // rows)
  if sliding_window is not None:
    context = min(context, sliding_window + query_tokens)
  work = Work(
    query_tokens=query_tokens,
    rows=rows,
    context=context,
    num_q_heads=q.shape[1],
    num_kv_heads=kv_pool.shape[3],
    head_dim=q.shape[2],
    is_narrow=kv_pool.dtype.itemsize == 1,
  )
  kernels = [decode, prefill] if suits_decode(work) else [prefill, decode]
  refusals = []
  for kernel in kernels:
    try:
      return kernel(
        q,
        cu_seqlens,
        q_positions,
        kv_pool,
        layer,
        tables,
        max_query_tokens=max_query_tokens,
        sliding_window=sliding_window,
        **options,
      )
    except NotImplementedError as error:
      refusals.append(f"{kernel.__name__}: {error}")
  raise NotImplementedError(" ".join(refusals))


def suits_decode(work: Work) -> bool:
  """Whether the decode kernel is the faster one, measured or estimated."""
  if work.is_narrow:
    return work.query_tokens <= _MOST_NARROW
  border = _measured_border(work)
  if border is not None:
    return work.query_tokens <= border
  passes = _passes(work)
  return passes == 1 or passes * _read_s(work) <= _prefill_s(work)


def _measured_border(work: Work) -> int | None:
  """Most query tokens for the decode kernel, if measured nearby."""
  group = work.num_q_heads // work.num_kv_heads
  if (group, work.head_dim) != (_MEASURED_GROUP, _MEASURED_HEAD_DIM):
    return None

  def distance(point: tuple[int, int]) -> float:
    logs = (math.log(x / y) for x, y in zip(point, work[1:3], strict=True))
    return max(abs(x) for x in logs)

  nearest = min(_MEASURED, key=distance)
  return _MEASURED[nearest] if distance(nearest) <= math.log(_NEAR) else None


def _passes(work: Work) -> int:
  """How often the decode kernel reads KV: once for some heads and tokens."""
  columns = 32 * 128 // max(work.head_dim, 128)
  eights = -(-work.num_q_heads // work.num_kv_heads // 8)
  parts = -(-8 * eights // columns)
  tokens = max(1, columns // (8 * eights))
  return parts * -(-work.query_tokens // tokens)


def _read_s(work: Work) -> float:
  """Time to read KV once."""
  kv_tokens = work.rows * work.context * work.num_kv_heads
  return 2 * 2 * kv_tokens * work.head_dim / _READ_BYTES_PER_S


def _prefill_s(work: Work) -> float:
  """Time to multiply tiles of 128 rows, one at least for each row and head."""
  heads_per_tile = 2 - work.num_q_heads // work.num_kv_heads % 2
  tiles = -(-work.query_tokens * heads_per_tile // 128) * work.rows
  tiles *= work.num_q_heads // heads_per_tile
  return tiles * 128 * work.context * 4 * work.head_dim / _FLOP_PER_S
