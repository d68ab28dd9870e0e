"""Micro-attention of many queries for Hopper GPUs, as a Mosaic GPU kernel.

After FlashAttention-3 (arXiv 2407.08608). A thread block has a tile of queries
of one KV head, and three warpgroups. One copies keys and values rBlock by
rBlock, with the tensor memory accelerator. The other two own 64 rows each, a
row being a query token of one head. They take turns: while one has the tensor
cores, the other one computes exponentials; and each also multiplies values by
its last weights while it computes the next ones. Where the group of query heads
is even, the two take different heads of the same tokens, and so need the same
KV.

`prefill_plan` says which KV tiles a query tile passes and which of them need a
mask. Calls with too few tiles to fill the device split the KV of each; their
states are merged after.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_state import AttentionState, merge_many
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.prefill_plan import (
  PrefillPlan,
  Segments,
  make_plan,
)
from pallas_kernels.pool_layout import NULL_BLOCK_ID, Layer

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)

_ROWS = 64  # Of a warpgroup: the M of one wgmma.
_NUM_SMS = 132
_NOWHERE = 2**31 - 1024  # A position that no query sees; adding a tile is safe.
_LOG2_E = math.log2(math.e)
# Below any logit, yet finite: the maximum of nothing, minus itself, is 0.
_LOWEST = -1e30
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
  """How the kernel is cut.

  Attributes:
    kv_tile: KV tokens per step.
    stages: KV tiles in flight.
    is_interpretable: Whether weights go through shared memory and sums through
      registers, which is slower, and is what interpret mode can do.
  """

  kv_tile: int
  stages: int
  is_interpretable: bool = False

  def __post_init__(self):
    if self.kv_tile % 64 or not 64 <= self.kv_tile <= 256:
      raise ValueError(
        f"kv_tile must be a multiple of 64 up to 256; got {self.kv_tile}."
      )
    if self.stages < 2:
      raise ValueError(f"stages must be at least 2; got {self.stages}.")


TUNINGS = {
  64: Tuning(kv_tile=128, stages=2),
  128: Tuning(kv_tile=128, stages=2),
  256: Tuning(kv_tile=64, stages=2),
}
"""The shipped tuning of each head dim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
  """The static numbers of one call."""

  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  block_size: int
  num_q_tiles: int
  num_splits: int
  scale: float
  sliding_window: int | None
  logit_soft_cap: float | None
  tuning: Tuning

  @property
  def heads_per_block(self) -> int:
    """Query heads that the two warpgroups share out."""
    return _heads_per_block(self.num_q_heads // self.num_kv_heads)

  @property
  def q_tile(self) -> int:
    return 2 * _ROWS // self.heads_per_block

  @property
  def blocks_per_kv_head(self) -> int:
    """Thread blocks that read one KV head for one query tile, of one split."""
    return self.num_q_heads // self.num_kv_heads // self.heads_per_block

  @property
  def piece(self) -> int:
    """KV tokens per copy: an rBlock, or what a tile has of one."""
    return min(self.tuning.kv_tile, self.block_size)

  @property
  def pieces(self) -> int:
    """Copies per KV tile."""
    return self.tuning.kv_tile // self.piece

  @property
  def log2_scale(self) -> float:
    """Multiplier on dot products, or on capped logits, to base 2."""
    if self.logit_soft_cap is None:
      return self.scale * _LOG2_E
    return self.logit_soft_cap * _LOG2_E


def _heads_per_block(group: int) -> int:
  return 1 if group % 2 else 2


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
  tuning: Tuning | None = None,
  num_splits: int | None = None,
  interpret: Any = None,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args, results and errors are those of `api.micro_attention`, and

  Args:
    q: `[T, H, D]` bf16 or f16, as the pool.
    cu_seqlens: `[B + 1]` int32.
    q_positions: `[T]` int32.
    kv_pool: `[N, L, 2, K, P, D]`, `D` of `HEAD_DIMS`, `P` of `BLOCK_SIZES`.
    layer: `[]` integer.
    tables: Of `B` rows.
    scale: Positive.
    max_query_tokens: Not used: rows of any length share tiles.
    sliding_window: How many positions a query sees; None is all.
    logit_soft_cap: As for `api.micro_attention`.
    tuning: How to cut the kernel; None is the shipped one.
    num_splits: Parts that each tile's KV is cut into; None fills the device.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `AttentionState` over `[T, H, D]`, float32.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  del max_query_tokens
  num_tokens, num_q_heads, head_dim = q.shape
  num_kv_heads, block_size = kv_pool.shape[3:5]
  _require_covered("kv_pool", "dtype", kv_pool.dtype, DTYPES)
  _require_covered("q", "dtype", q.dtype, (kv_pool.dtype,))
  _require_covered("q", "head dim", head_dim, HEAD_DIMS)
  _require_covered("kv_pool", "block size", block_size, BLOCK_SIZES)
  if not scale > 0:
    raise NotImplementedError(f"scale: covers positive ones; got {scale}.")
  tuning = tuning or TUNINGS[head_dim]
  heads_per_block = _heads_per_block(num_q_heads // num_kv_heads)
  num_q_tiles = -(-num_tokens * heads_per_block // (2 * _ROWS))
  if num_splits is None:
    num_blocks = num_q_tiles * (num_q_heads // heads_per_block)
    num_splits = _default_splits(
      num_blocks, tables.block_ids.shape[0] * block_size // tuning.kv_tile
    )
  shape = _Shape(
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
  return _micro_attention(
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    tables,
    shape=shape,
    interpret=interpret,
  )


def _require_covered(
  name: str, what: str, value: object, covered: tuple[Any, ...]
) -> None:
  if value not in covered:
    raise NotImplementedError(
      f"{name}: covers a {what} of"
      f" {', '.join(str(getattr(x, '__name__', x)) for x in covered)};"
      f" got {value}."
    )


def _default_splits(num_blocks: int, most_steps: int) -> int:
  """Splits of KV so that every SM has a thread block, where KV is long enough.

  One more split than fits is worse than one less, so this rounds down; and a
  split of less than eight steps costs more in merging than it gains.
  """
  return max(1, min(_NUM_SMS // num_blocks, most_steps // 8, 32))


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  *,
  shape: _Shape,
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
  shape: _Shape,
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
    "q_smem": smem(2, _ROWS, head_dim),
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
    scratch["p_smem"] = smem(2, _ROWS, tuning.kv_tile)
  num_blocks = (
    shape.num_kv_heads
    * shape.num_q_tiles
    * shape.blocks_per_kv_head
    * num_splits
  )
  of = jax.ShapeDtypeStruct
  return plgpu.kernel(
    functools.partial(_kernel, shape=shape),
    out_type=(
      of((num_splits, padded_tokens, num_heads, head_dim), jnp.float32),
      of((num_splits, num_heads, padded_tokens), jnp.float32),
    ),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    interpret=interpret,
  )(
    plan.q_positions,
    plan.rows,
    plan.segments,
    layer[None],
    tables.block_ids,
    tables.logical_ids,
    q,
    kv_pool,
  )


# The kernel. All warpgroups walk over the same KV tiles in the same order.


class _Block:
  """What a thread block works on: its refs, and its place in the grid."""

  def __init__(
    self,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
    shape: _Shape,
  ):
    """Finds the place of this block.

    The KV head varies slowest, so that blocks that run together read the same
    KV, and long query tiles come before short ones.

    Args:
      refs: Operands and results, as `_launch` passes them.
      scratch: Shared memory and barriers, by name.
      shape: The static numbers.
    """
    (
      self.q_positions,
      self.rows,
      self.segments,
      layer,
      self.block_ids,
      self.logical_ids,
      self.q,
      self.kv_pool,
      self.out,
      self.lse,
    ) = refs
    self.shape = shape
    self.scratch = scratch
    self.warpgroup = lax.axis_index("warpgroup")
    self.layer = layer[0]
    rest = lax.axis_index("block")
    rest, self.split = _div_rem(rest, shape.num_splits)
    rest, self.head_of_group = _div_rem(rest, shape.blocks_per_kv_head)
    self.kv_head, tile = _div_rem(rest, shape.num_q_tiles)
    self.q_tile = shape.num_q_tiles - 1 - tile

  def __getattr__(self, name: str) -> Any:
    try:
      return self.scratch[name]
    except KeyError:
      raise AttributeError(name) from None

  def walk[Carry](
    self,
    step: Callable[[Segments, jax.Array, bool, Carry], Carry],
    carry: Carry,
  ) -> Carry:
    """Applies `step(segment, kv_tile, is_masked, carry)` to each KV tile."""
    num_splits = self.shape.num_splits

    def pass_segment(row: jax.Array, carry: Carry) -> Carry:
      number = self.q_tile + row
      segment = Segments(
        *(self.segments[number, i] for i in range(len(Segments._fields)))
      )
      num_tiles = segment.end - segment.begin
      begin, end = (
        segment.begin + lax.div(num_tiles * part, num_splits)
        for part in (self.split, self.split + 1)
      )
      full_begin = jnp.clip(segment.full_begin, begin, end)
      full_end = jnp.clip(segment.full_end, full_begin, end)
      for first, last, is_masked in (
        (begin, full_begin, True),
        (full_begin, full_end, False),
        (full_end, end, True),
      ):
        carry = lax.fori_loop(
          first,
          last,
          lambda tile, carry, is_masked=is_masked: step(
            segment, tile, is_masked, carry
          ),
          carry,
        )
      return carry

    return lax.fori_loop(
      self.rows[self.q_tile, 0], self.rows[self.q_tile, 1], pass_segment, carry
    )

  def pieces(
    self, segment: Segments, tile: jax.Array
  ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """rBlock, first token in it, and entry of each copy of a KV tile."""
    shape = self.shape
    pieces = []
    for i in range(shape.pieces):
      if shape.block_size > shape.piece:
        entry, part = _div_rem(tile, shape.block_size // shape.piece)
      else:
        entry, part = tile * shape.pieces + i, 0
      is_held = entry < segment.num_entries
      entry = segment.first_entry + jnp.minimum(entry, segment.num_entries - 1)
      block_id = jnp.where(is_held, self.block_ids[entry], NULL_BLOCK_ID)
      pieces.append((block_id, part * shape.piece, entry))
    return pieces

  def first_positions(
    self, pieces: list[tuple[jax.Array, jax.Array, jax.Array]]
  ) -> list[jax.Array]:
    """Position of the first token of each copy."""
    return [
      jnp.where(
        block_id == NULL_BLOCK_ID,
        _NOWHERE,
        self.logical_ids[entry] * self.shape.block_size + first,
      )
      for block_id, first, entry in pieces
    ]

  def positions(
    self, first_positions: list[jax.Array], begin: int, size: int, layout: Any
  ) -> jax.Array:
    """Positions `[size]` of the tokens of a KV tile from `begin` on."""
    piece = self.shape.piece
    token = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    token += begin
    positions = token + first_positions[0]
    for i, first in enumerate(first_positions[1:], 1):
      positions = jnp.where(
        token >= i * piece, token + (first - i * piece), positions
      )
    return positions


def _div_rem(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
  return lax.div(x, jnp.int32(divisor)), lax.rem(x, jnp.int32(divisor))


def _kernel(*refs: Any, shape: _Shape, **scratch: Any) -> None:
  """The body: two warpgroups compute, one copies."""
  block = _Block(refs, scratch, shape)

  @pl.when(block.warpgroup < 2)
  def _():
    plgpu.set_max_registers(232, action="increase")
    _compute(block)

  @pl.when(block.warpgroup == 2)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    _copy(block)


def _copy(block: _Block) -> None:
  """Copies KV tiles into shared memory, as room becomes free."""
  shape, stages = block.shape, block.shape.tuning.stages
  # Values are multiplied one step after their keys; in the first step, zeros.
  _write_zeros(block, block.v_smem.at[0])
  for _ in range(shape.pieces):
    plgpu.barrier_arrive(block.v_full.at[0])

  def copy_tile(
    segment: Segments, tile: jax.Array, is_masked: bool, step: jax.Array
  ) -> jax.Array:
    pieces = block.pieces(segment, tile)

    def start(which: int, smem: Any, slot: jax.Array, barrier: Any) -> None:
      for i, (block_id, first, _) in enumerate(pieces):
        plgpu.copy_gmem_to_smem(
          block.kv_pool.at[
            block_id,
            block.layer,
            which,
            block.kv_head,
            pl.ds(first, shape.piece),
          ],
          smem.at[slot, pl.ds(i * shape.piece, shape.piece)],
          barrier,
        )

    k_slot = lax.rem(step, stages)
    v_slot = lax.rem(step + 1, stages)

    @pl.when(step >= stages)
    def _():
      plgpu.barrier_wait(block.k_free.at[k_slot])

    start(0, block.k_smem, k_slot, block.k_full.at[k_slot])

    @pl.when(step + 1 >= stages)
    def _():
      plgpu.barrier_wait(block.v_free.at[v_slot])

    if not is_masked:
      start(1, block.v_smem, v_slot, block.v_full.at[v_slot])
      return step + 1

    firsts = block.first_positions(pieces)
    is_dirty = functools.reduce(
      jnp.logical_or,
      [
        (first < segment.reach_begin)
        | (first + (shape.piece - 1) > segment.reach_end)
        for first in firsts
      ],
    )

    @pl.when(jnp.logical_not(is_dirty))
    def _():
      start(1, block.v_smem, v_slot, block.v_full.at[v_slot])

    @pl.when(is_dirty)
    def _():
      start(1, block.v_smem, v_slot, block.v_raw)
      plgpu.barrier_wait(block.v_raw)
      _zero_out_of_reach(block, block.v_smem.at[v_slot], firsts, segment)
      for _ in range(shape.pieces):
        plgpu.barrier_arrive(block.v_full.at[v_slot])

    return step + 1

  num_steps = block.walk(copy_tile, jnp.int32(0))
  # Nobody reuses what was freed last.
  for free, count in (
    (block.k_free, num_steps),
    (block.v_free, num_steps + 1),
  ):

    def drain(step: jax.Array, _: None, free: Any = free) -> None:
      plgpu.barrier_wait(free.at[lax.rem(step, stages)])

    lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)


def _patches(block: _Block) -> list[tuple[int, Any]]:
  """First token and index of each 64 x 64 part of a tile of values."""
  return [
    (row, (pl.ds(row, 64), pl.ds(column, 64)))
    for row in range(0, block.shape.tuning.kv_tile, 64)
    for column in range(0, block.shape.head_dim, 64)
  ]


def _write_zeros(block: _Block, values: Any) -> None:
  zeros = plgpu.layout_cast(
    jnp.zeros((64, 64), values.dtype), plgpu.Layout.WGMMA
  )
  for _, index in _patches(block):
    values[index] = zeros
  plgpu.commit_smem()


def _zero_out_of_reach(
  block: _Block,
  values: Any,
  first_positions: list[jax.Array],
  segment: Segments,
) -> None:
  """Overwrites values that may be NaN, which a weight of 0 does not cancel."""
  for row, index in _patches(block):
    x = plgpu.load(values.at[index], layout=plgpu.Layout.WGMMA)
    positions = block.positions(first_positions, row, 64, _BY_ROW)
    positions = lax.broadcast_in_dim(positions, x.shape, [0])
    in_reach = (positions >= segment.reach_begin) & (
      positions <= segment.reach_end
    )
    values[index] = jnp.where(in_reach, x, jnp.zeros_like(x))
  plgpu.commit_smem()


def _compute(block: _Block) -> None:
  """Attends 64 rows to the KV tiles, and writes their state."""
  shape, me = block.shape, block.warpgroup
  if shape.heads_per_block == 2:
    token, head = block.q_tile * _ROWS, block.head_of_group * 2 + me
  else:
    token, head = (block.q_tile * 2 + me) * _ROWS, block.head_of_group
  head += block.kv_head * (shape.num_q_heads // shape.num_kv_heads)
  plgpu.copy_gmem_to_smem(
    block.q.at[pl.ds(token, _ROWS), head],
    block.q_smem.at[me],
    block.q_full.at[me],
  )
  q_positions = plgpu.load(
    block.q_positions.at[pl.ds(token, _ROWS)], layout=_BY_ROW, optimized=False
  )
  plgpu.barrier_wait(block.q_full.at[me])

  def logits(
    s: jax.Array, segment: Segments, tile: jax.Array, is_masked: bool
  ) -> jax.Array:
    if shape.logit_soft_cap is not None:
      # tanh(x) = 1 - 2 / (exp(2 x) + 1); the device's own is too coarse.
      factor = 2 * _LOG2_E * shape.scale / shape.logit_soft_cap
      s = 1.0 - 2.0 / (jnp.exp2(s * factor) + 1.0)
    if not is_masked:
      return s
    tokens = token + plgpu.broadcasted_iota(
      jnp.int32, (_ROWS,), 0, layout=_BY_ROW
    )
    is_own = (tokens >= segment.first_query) & (tokens < segment.end_query)
    q = jnp.where(is_own, q_positions, -1)
    kv = block.positions(
      block.first_positions(block.pieces(segment, tile)),
      0,
      shape.tuning.kv_tile,
      _BY_COLUMN,
    )
    q = lax.broadcast_in_dim(q, s.shape, [0])
    kv = lax.broadcast_in_dim(kv, s.shape, [1])
    sees = kv <= q
    if shape.sliding_window is not None:
      sees &= q - kv < shape.sliding_window
    return jnp.where(sees, s, -jnp.inf)

  acc, top, total = _attend(block, logits)

  is_empty = (total == 0.0) | (q_positions < 0)
  inverse = jnp.where(is_empty, 0.0, 1.0 / total)
  weight = lax.broadcast_in_dim(inverse, acc.shape, [0])
  out = jnp.where(weight > 0.0, acc * weight, 0.0)
  lse = jnp.where(is_empty, -jnp.inf, top * math.log(2) + jnp.log(total))
  block.out[block.split, pl.ds(token, _ROWS), head] = out
  block.lse[block.split, head, pl.ds(token, _ROWS)] = lse


def _initial_sums(shape: _Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted sum of values, maximum of logits to base 2, sum of weights."""

  def full(dims: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), layout)

  return (
    full((_ROWS, shape.head_dim), 0.0, plgpu.Layout.WGMMA),
    full((_ROWS,), _LOWEST, _BY_ROW),
    full((_ROWS,), 0.0, _BY_ROW),
  )


def _weights(
  s: jax.Array, top: jax.Array, shape: _Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """New maximum, decay of what was summed before, and weights `[64, KV]`."""
  scale = shape.log2_scale
  new_top = jnp.maximum(top, jnp.max(s, axis=1) * scale)
  decay = jnp.exp2(top - new_top)
  return (
    new_top,
    decay,
    jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0])),
  )


def _attend(
  block: _Block, logits: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over all KV tiles; a step's values are multiplied one step later.

  A warpgroup issues both products of a step in one turn, and computes the
  weights of the new logits while the old weights still multiply values.
  """
  shape, tuning, me = block.shape, block.shape.tuning, block.warpgroup
  dtype = block.q_smem.dtype

  def multiply_values(acc_ref: Any, acc: jax.Array, p: Any, slot: Any) -> None:
    if tuning.is_interpretable:
      plgpu.wgmma(acc_ref, block.p_smem.at[me], block.v_smem.at[slot])
    else:
      acc_ref[...] = acc
      plgpu.wgmma(acc_ref, p, block.v_smem.at[slot])

  def read(acc_ref: Any, acc: jax.Array) -> jax.Array:
    return acc + acc_ref[...] if tuning.is_interpretable else acc_ref[...]

  def keep(p: jax.Array) -> None:
    if tuning.is_interpretable:
      block.p_smem.at[me][...] = p
      plgpu.commit_smem()

  def step(
    segment: Segments, tile: jax.Array, is_masked: bool, carry: Any
  ) -> Any:
    number, acc, top, total, p = carry
    slot = lax.rem(number, tuning.stages)
    plgpu.barrier_wait(block.k_full.at[slot])
    plgpu.barrier_wait(block.v_full.at[slot])
    plgpu.barrier_wait(block.turn.at[me])

    def multiply(s_ref: Any, acc_ref: Any) -> Any:
      keys = block.k_smem.at[slot].transpose((1, 0))
      plgpu.wgmma(s_ref, block.q_smem.at[me], keys)
      multiply_values(acc_ref, acc, p, slot)
      plgpu.barrier_arrive(block.turn.at[1 - me])
      s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
      plgpu.barrier_arrive(block.k_free.at[slot])
      s = logits(s, segment, tile, is_masked)
      new_top, decay, weights = _weights(s, top, shape)
      new_total = total * decay + jnp.sum(weights, axis=1)
      new_acc = read(acc_ref, acc)
      plgpu.barrier_arrive(block.v_free.at[slot])
      new_acc *= lax.broadcast_in_dim(decay, new_acc.shape, [0])
      new_p = weights.astype(dtype)
      keep(new_p)
      return new_acc, new_top, new_total, new_p

    return number + 1, *pl.run_scoped(
      multiply,
      plgpu.ACC((_ROWS, tuning.kv_tile), jnp.float32),
      plgpu.ACC(acc.shape, jnp.float32),
    )

  @pl.when(me == 1)
  def _():
    plgpu.barrier_arrive(block.turn.at[0])

  p = plgpu.layout_cast(
    jnp.zeros((_ROWS, tuning.kv_tile), dtype), plgpu.Layout.WGMMA
  )
  keep(p)
  number, acc, top, total, p = block.walk(
    step, (jnp.int32(0), *_initial_sums(shape), p)
  )

  @pl.when(me == 0)
  def _():
    plgpu.barrier_wait(block.turn.at[0])

  slot = lax.rem(number, tuning.stages)
  plgpu.barrier_wait(block.v_full.at[slot])

  def multiply_last(acc_ref: Any) -> jax.Array:
    multiply_values(acc_ref, acc, p, slot)
    return read(acc_ref, acc)

  acc = pl.run_scoped(multiply_last, plgpu.ACC(acc.shape, jnp.float32))
  plgpu.barrier_arrive(block.v_free.at[slot])
  return acc, top, total
