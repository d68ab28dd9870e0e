"""The body of the decode kernel, which `mosaic_gpu_decode` launches."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention.decode_geometry import Geometry
from pallas_kernels.micro_attention.decode_plan import RowField, WorkerField
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_LOG2_E = math.log2(math.e)
_EMPTY_TOP = -1e30
_NOWHERE = 2**31 - 1024  # A position behind every query; room to add a tile.

_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # One value for each column.
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED  # To store a matrix transposed.


class _Segment(NamedTuple):
  """A run of tiles of one item, as one worker meets it.

  Attributes:
    number: Segments of this worker before it.
    tiles_before: Tiles of this worker before it.
    row: The item's row.
    head: The item's KV head.
    chunk: Number of the item's group of query tokens within the row.
    first_tile: Within the item.
    num_tiles: Of the segment.
    item_tiles: Of the item.
  """

  number: jax.Array
  tiles_before: jax.Array
  row: jax.Array
  head: jax.Array
  chunk: jax.Array
  first_tile: jax.Array
  num_tiles: jax.Array
  item_tiles: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
  """What the kernel reads and writes.

  Attributes:
    workers: `[W, 8]` int32, global memory, as are those up to `merged`.
    rows: `[B, 8]` int32.
    bounds: `[2]` int32. Where the first row's queries begin, the last's end.
    q_positions: `[T]` int32.
    block_ids: `[E]` int32.
    logical_ids: `[E]` int32.
    layer: `[1]` int32.
    q: `[T, H or more, D]`.
    pool: `[N * L * 2 * K, P, D]`.
    out: `[T, H, D]` float32.
    lse: `[T, H]` float32.
    parts: `[W, D, columns]` float32. Sums of first items begun elsewhere.
    part_sums: `[W, 2, columns]` float32. Their tops and totals.
    k_smem: `[stages, tile, D]`, shared memory, as are those below.
    v_smem: `[stages, tile, D]`.
    q_smem: `[2, columns, D]`.
    p_smem: `[columns, tile]`. Weights of a tile.
    out_smem: `[columns, D]` float32.
    lse_smem: `[columns]` float32.
    first_smem: `[stages * copies]` int32. Position of each copy's first token.
    k_full: Barriers `[stages]`: keys have come.
    v_full: Barriers `[stages]`: values have come.
    k_empty: Barriers `[stages]`: keys were used.
    v_empty: Barriers `[stages]`: values were used.
    q_full: Barriers `[2]`: queries have come.
    q_empty: Barriers `[2]`: queries were used.
    merged: Semaphores `[W]`: parts written for an item begun at a worker; None
      where blocks run one after another.
  """

  workers: Any
  rows: Any
  bounds: Any
  q_positions: Any
  block_ids: Any
  logical_ids: Any
  layer: Any
  q: Any
  pool: Any
  out: Any
  lse: Any
  parts: Any
  part_sums: Any
  k_smem: Any
  v_smem: Any
  q_smem: Any
  p_smem: Any
  out_smem: Any
  lse_smem: Any
  first_smem: Any
  k_full: Any
  v_full: Any
  k_empty: Any
  v_empty: Any
  q_full: Any
  q_empty: Any
  merged: Any = None


def run(g: Geometry, refs: Refs) -> None:
  """The kernel's body.

  Args:
    g: What is static.
    refs: What it reads and writes.
  """
  # Who waits for others at a merge has a higher block number than they.
  worker = g.tuning.num_workers - 1 - lax.axis_index("block")
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup == 0)
  def _():
    _write_padding(g, refs, worker)
    _walk(g, refs, worker, functools.partial(_attend, g, refs, worker))
    plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 1)
  def _():
    num_segments = _walk(g, refs, worker, functools.partial(_copy, g, refs))
    _drain(g, refs, worker, num_segments)


def _walk(
  g: Geometry,
  refs: Refs,
  worker: jax.Array,
  visit: Callable[[_Segment], None],
) -> jax.Array:
  """Visits the segments of a worker; returns their number."""
  num_tiles = refs.workers[worker, WorkerField.NUM_TILES]
  items_per_row = g.num_kv_heads * g.items_per_head

  def step(carry):
    number, done, row, item, tile = carry
    item_tiles = refs.rows[row, RowField.NUM_TILES]
    segment_tiles = jnp.minimum(item_tiles - tile, num_tiles - done)
    visit(
      _Segment(
        number=number,
        tiles_before=done,
        row=row,
        head=lax.div(item, g.items_per_head),
        chunk=lax.rem(item, g.items_per_head),
        first_tile=tile,
        num_tiles=segment_tiles,
        item_tiles=item_tiles,
      )
    )
    is_last = item == items_per_row - 1
    next_row = jnp.where(is_last, refs.rows[row, RowField.NEXT_ROW], row)
    next_item = jnp.where(is_last, 0, item + 1)
    zero = jnp.int32(0)
    return number + 1, done + segment_tiles, next_row, next_item, zero

  start = (
    jnp.int32(0),
    jnp.int32(0),
    refs.workers[worker, WorkerField.ROW],
    refs.workers[worker, WorkerField.ITEM],
    refs.workers[worker, WorkerField.TILE],
  )
  return lax.while_loop(lambda carry: carry[1] < num_tiles, step, start)[0]


def _query_tokens(
  g: Geometry, refs: Refs, segment: _Segment
) -> list[tuple[jax.Array, jax.Array]]:
  """Index of each query token of an item, and whether there is such a one."""
  first = refs.rows[segment.row, RowField.FIRST_QUERY]
  count = refs.rows[segment.row, RowField.NUM_QUERIES]
  last = refs.q.shape[0] - 1
  tokens = []
  for i in range(g.tokens_per_item):
    in_row = segment.chunk * g.tokens_per_item + i
    tokens.append((jnp.minimum(first + in_row, last), in_row < count))
  return tokens


# The copy warpgroup.


def _copy(g: Geometry, refs: Refs, segment: _Segment) -> None:
  """Brings an item's queries, and the segment's keys and values."""
  stages, tile_tokens = g.tuning.num_stages, g.tuning.tile_tokens
  q_slot = lax.rem(segment.number, 2)

  @pl.when(segment.number >= 2)
  def _():
    plgpu.barrier_wait(refs.q_empty.at[q_slot])

  first_head = pl.multiple_of(segment.head * g.group // 8 * 8, 8)
  for i, (token, _) in enumerate(_query_tokens(g, refs, segment)):
    plgpu.copy_gmem_to_smem(
      refs.q.at[token, pl.ds(first_head, g.head_columns)],
      refs.q_smem.at[q_slot, pl.ds(i * g.head_columns, g.head_columns)],
      refs.q_full.at[q_slot],
    )

  first_entry = refs.rows[segment.row, RowField.FIRST_ENTRY]
  num_entries = refs.rows[segment.row, RowField.NUM_ENTRIES]
  last_entry = refs.block_ids.shape[0] - 1
  layer = refs.layer[0]

  def read(tile: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """rBlock and first position of each copy of a tile."""
    found = []
    for i in range(g.copies):
      entry = lax.div(tile, g.tiles_per_block) * g.copies + i
      offset = lax.rem(tile, g.tiles_per_block) * tile_tokens
      index = jnp.clip(first_entry + entry, 0, last_entry)
      is_held = entry < num_entries
      block = jnp.where(is_held, refs.block_ids[index], NULL_BLOCK_ID)
      first = refs.logical_ids[index] * g.block_size + offset
      first = jnp.where(block == NULL_BLOCK_ID, _NOWHERE, first)
      found.append((block, first))
    return found

  def copy(
    tile: jax.Array,
    slot: jax.Array,
    copies: list[tuple[jax.Array, jax.Array]],
    which: int,
  ) -> None:
    smem = (refs.k_smem, refs.v_smem)[which]
    full = (refs.k_full, refs.v_full)[which]
    offset: int | jax.Array = 0
    if g.tiles_per_block > 1:
      offset = lax.rem(tile, g.tiles_per_block) * tile_tokens
      offset = pl.multiple_of(offset, tile_tokens)
    for i, (block, _) in enumerate(copies):
      index = (block * g.num_layers + layer) * 2 + which
      plgpu.copy_gmem_to_smem(
        refs.pool.at[
          index * g.num_kv_heads + segment.head, pl.ds(offset, g.copy_tokens)
        ],
        smem.at[slot, pl.ds(i * g.copy_tokens, g.copy_tokens)],
        full.at[slot],
      )

  def step(i: jax.Array, _: None) -> None:
    number = segment.tiles_before + i
    slot = lax.rem(number, stages)
    tile = segment.first_tile + i
    copies = read(tile)

    @pl.when(number >= stages)
    def _():
      plgpu.barrier_wait(refs.k_empty.at[slot])

    for j, (_, first) in enumerate(copies):
      refs.first_smem[slot * g.copies + j] = first
    copy(tile, slot, copies, 0)

    @pl.when(number >= stages)
    def _():
      plgpu.barrier_wait(refs.v_empty.at[slot])

    copy(tile, slot, copies, 1)

  lax.fori_loop(0, segment.num_tiles, step, None)


def _drain(
  g: Geometry, refs: Refs, worker: jax.Array, num_segments: jax.Array
) -> None:
  """Waits for the last uses of the rings."""

  def drain(count: jax.Array, ring: int, *barriers: Any) -> None:
    left = jnp.minimum(count, ring)

    def step(i: jax.Array, _: None) -> None:
      slot = lax.rem(count - left + i, ring)
      for barrier in barriers:
        plgpu.barrier_wait(barrier.at[slot])

    lax.fori_loop(0, left, step, None)

  num_tiles = refs.workers[worker, WorkerField.NUM_TILES]
  drain(num_tiles, g.tuning.num_stages, refs.k_empty, refs.v_empty)
  drain(num_segments, 2, refs.q_empty)


# The compute warpgroup.


class _Sums(NamedTuple):
  """A softmax under way: sums of `exp2(logit - top)`, logits base 2.

  Attributes:
    acc: `[D, columns]` float32. Sum of the weighted values.
    top: `[columns]` float32. Largest logit so far; -1e30 is none.
    total: `[columns]` float32. Sum of the weights.
  """

  acc: jax.Array
  top: jax.Array
  total: jax.Array


def _attend(
  g: Geometry, refs: Refs, worker: jax.Array, segment: _Segment
) -> None:
  """Attends an item's queries to a segment's tiles; hands the sums on."""
  q_slot = lax.rem(segment.number, 2)
  tokens = _query_tokens(g, refs, segment)
  positions = [
    jnp.where(is_there, refs.q_positions[token], -1)
    for token, is_there in tokens
  ]
  plgpu.barrier_wait(refs.q_full.at[q_slot])
  sums = lax.fori_loop(
    0,
    segment.num_tiles,
    functools.partial(_attend_tile, g, refs, segment, q_slot, positions),
    _no_sums(g),
  )
  plgpu.barrier_arrive(refs.q_empty.at[q_slot])

  begins_here = segment.first_tile == 0
  ends_here = segment.first_tile + segment.num_tiles == segment.item_tiles

  @pl.when(begins_here & ends_here)
  def _():
    _write(g, refs, segment, tokens, sums)

  @pl.when(~begins_here)
  def _():
    refs.parts.at[worker][...] = sums.acc
    refs.part_sums.at[worker, 0][...] = sums.top
    refs.part_sums.at[worker, 1][...] = sums.total
    if refs.merged is not None:
      owner = refs.workers[worker, WorkerField.OWNER]
      plgpu.commit_smem()  # For its barrier: one thread signals for all.
      plgpu.semaphore_signal(refs.merged.at[owner], memory_scope="gpu")

  @pl.when(begins_here & ~ends_here)
  def _():
    last = refs.workers[worker, WorkerField.LAST]
    if refs.merged is not None:
      plgpu.semaphore_wait(
        refs.merged.at[worker],
        last - worker,
        decrement=False,
        memory_scope="gpu",
      )
    whole = _merge_parts(g, refs, worker + 1, last, sums)
    _write(g, refs, segment, tokens, whole)


def _no_sums(g: Geometry) -> _Sums:
  def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  return _Sums(
    acc=full((g.head_dim, g.columns), 0.0, plgpu.Layout.WGMMA),
    top=full((g.columns,), _EMPTY_TOP, _COLUMNS),
    total=full((g.columns,), 0.0, _COLUMNS),
  )


def _attend_tile(
  g: Geometry,
  refs: Refs,
  segment: _Segment,
  q_slot: jax.Array,
  positions: list[jax.Array],
  i: jax.Array,
  sums: _Sums,
) -> _Sums:
  """Adds tile `i` of a segment to the sums."""
  tile_tokens, columns = g.tuning.tile_tokens, g.columns
  shape = (tile_tokens, columns)
  slot = lax.rem(segment.tiles_before + i, g.tuning.num_stages)

  plgpu.barrier_wait(refs.k_full.at[slot])
  firsts = [refs.first_smem[slot * g.copies + j] for j in range(g.copies)]

  def multiply_keys(acc: Any) -> jax.Array:
    plgpu.wgmma(acc, refs.k_smem.at[slot], refs.q_smem.at[q_slot].T)
    return plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)

  logits = pl.run_scoped(multiply_keys, plgpu.ACC(shape, jnp.float32))
  plgpu.barrier_arrive(refs.k_empty.at[slot])

  if g.soft_cap is None:
    logits *= g.scale * _LOG2_E
  else:
    logits = jnp.tanh(logits * (g.scale / g.soft_cap)) * (g.soft_cap * _LOG2_E)
  kv_positions = _kv_positions(g, firsts)
  behind = _across(_column_positions(g, positions), shape) - _down(
    kv_positions, shape
  )
  sees = behind >= 0
  if g.sliding_window is not None:
    sees &= behind < g.sliding_window
  logits = jnp.where(sees, logits, -jnp.inf)

  top = jnp.maximum(sums.top, jnp.max(logits, axis=0))
  decay = jnp.exp2(sums.top - top)
  weights = jnp.exp2(logits - _across(top, shape))
  refs.p_smem.T[...] = plgpu.layout_cast(weights.astype(g.dtype), _TRANSPOSED)
  plgpu.commit_smem()

  plgpu.barrier_wait(refs.v_full.at[slot])
  _clear_unreachable(g, refs, slot, firsts, kv_positions, positions)

  def multiply_values(acc: Any) -> tuple[jax.Array, jax.Array]:
    plgpu.wgmma(acc, refs.v_smem.at[slot].T, refs.p_smem.T)
    total = sums.total * decay + jnp.sum(weights, axis=0)
    return plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA), total

  acc_shape = (g.head_dim, columns)
  acc, total = pl.run_scoped(multiply_values, plgpu.ACC(acc_shape, jnp.float32))
  plgpu.barrier_arrive(refs.v_empty.at[slot])
  return _Sums(
    acc=sums.acc * _across(decay, acc_shape) + acc, top=top, total=total
  )


def _across(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats one value per column down all rows."""
  x = plgpu.layout_cast(x, _COLUMNS)
  return plgpu.layout_cast(
    lax.broadcast_in_dim(x, shape, (1,)), plgpu.Layout.WGMMA
  )


def _down(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats one value per row across all columns."""
  x = plgpu.layout_cast(x, _ROWS)
  return plgpu.layout_cast(
    lax.broadcast_in_dim(x, shape, (0,)), plgpu.Layout.WGMMA
  )


def _column_positions(g: Geometry, positions: list[jax.Array]) -> jax.Array:
  """Query position of each column, `[columns]` int32."""
  column = plgpu.broadcasted_iota(jnp.int32, (g.columns,), 0, layout=_COLUMNS)
  result = jnp.broadcast_to(positions[0], (g.columns,))
  result = plgpu.layout_cast(result, _COLUMNS)
  for i, position in enumerate(positions[1:], start=1):
    # The scalar must stand last: where it stands first, JAX 0.11.2 takes the
    # result for unsigned, and -1 for a huge position.
    result = jnp.where(column < i * g.head_columns, result, position)
  return result


def _kv_positions(g: Geometry, firsts: list[jax.Array]) -> jax.Array:
  """Position of each token of a tile, `[tile]` int32."""
  token = plgpu.broadcasted_iota(
    jnp.int32, (g.tuning.tile_tokens,), 0, layout=_ROWS
  )
  result = token + firsts[0]
  for i, first in enumerate(firsts[1:], start=1):
    start = i * g.copy_tokens
    result = jnp.where(token >= start, token + (first - start), result)
  return result


def _clear_unreachable(
  g: Geometry,
  refs: Refs,
  slot: jax.Array,
  firsts: list[jax.Array],
  kv_positions: jax.Array,
  positions: list[jax.Array],
) -> None:
  """Clears the values of tokens that no query sees: they may be NaN.

  Their weight is 0, but 0 * NaN is NaN. Most tiles have none.
  """
  last = functools.reduce(jnp.maximum, positions)
  first = functools.reduce(
    jnp.minimum, [jnp.where(p < 0, _NOWHERE, p) for p in positions]
  )
  is_whole = jnp.bool_(True)
  for start in firsts:
    is_whole &= start + (g.copy_tokens - 1) <= last
    if g.sliding_window is not None:
      is_whole &= first - start < g.sliding_window

  @pl.when(~is_whole)
  def _():
    in_reach = kv_positions <= last
    if g.sliding_window is not None:
      in_reach &= first - kv_positions < g.sliding_window
    shape = (g.tuning.tile_tokens, 64)
    zeros = jnp.zeros(shape, g.dtype)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    for column in range(0, g.head_dim, 64):
      values = refs.v_smem.at[slot, :, pl.ds(column, 64)]
      old = plgpu.load(values, layout=plgpu.Layout.WGMMA)
      values[...] = jnp.where(_down(in_reach, shape), old, zeros)
    plgpu.commit_smem()


def _merge_parts(
  g: Geometry, refs: Refs, first: jax.Array, last: jax.Array, sums: _Sums
) -> _Sums:
  """Adds the parts that workers `first` to `last` wrote."""
  at_once = max(1, 64 // g.columns)  # Loads under way, within the registers.

  def load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)

  def step(i: jax.Array, sums: _Sums) -> _Sums:
    workers = [first + i * at_once + j for j in range(at_once)]
    there = [jnp.minimum(worker, last) for worker in workers]
    tops = [load(refs.part_sums.at[worker, 0], _COLUMNS) for worker in there]
    totals = [load(refs.part_sums.at[worker, 1], _COLUMNS) for worker in there]
    accs = [load(refs.parts.at[w], plgpu.Layout.WGMMA) for w in there]
    top = functools.reduce(jnp.maximum, tops, sums.top)
    decay = jnp.exp2(sums.top - top)
    acc = sums.acc * _across(decay, sums.acc.shape)
    total = sums.total * decay
    for j, worker in enumerate(workers):
      weight = jnp.where(worker <= last, jnp.exp2(tops[j] - top), 0.0)
      acc += accs[j] * _across(weight, acc.shape)
      total += totals[j] * weight
    return _Sums(acc=acc, top=top, total=total)

  count = lax.div(last - first + at_once, at_once)
  return lax.fori_loop(0, count, step, sums)


def _write(
  g: Geometry,
  refs: Refs,
  segment: _Segment,
  tokens: list[tuple[jax.Array, jax.Array]],
  sums: _Sums,
) -> None:
  """Writes the state of an item whose sums are whole."""
  is_empty = sums.total == 0
  divisor = jnp.where(is_empty, 1.0, sums.total)
  lse = (sums.top + jnp.log2(divisor)) * (1 / _LOG2_E)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  out = sums.acc / _across(divisor, sums.acc.shape)
  refs.out_smem.T[...] = plgpu.layout_cast(out, _TRANSPOSED)
  refs.lse_smem[...] = jnp.where(is_empty, -jnp.inf, lse)
  plgpu.commit_smem()
  first_head = segment.head * g.group
  for number, (token, is_there) in enumerate(tokens):
    first_column = number * g.head_columns + lax.rem(first_head, 8)

    @pl.when(is_there)
    def _(token=token, first_column=first_column):
      plgpu.copy_smem_to_gmem(
        refs.out_smem.at[pl.ds(first_column, g.group)],
        refs.out.at[token, pl.ds(first_head, g.group)],
      )

      def write_lse(i: jax.Array, _: None) -> None:
        refs.lse[token, first_head + i] = refs.lse_smem[first_column + i]

      lax.fori_loop(0, g.group, write_lse, None)


def _write_padding(g: Geometry, refs: Refs, worker: jax.Array) -> None:
  """Writes the empty states of queries outside of every row."""
  num_tokens = refs.out.shape[0]
  num_before = refs.bounds[0]
  num_padding = num_before + num_tokens - refs.bounds[1]
  workers = g.tuning.num_workers

  def step(i: jax.Array, _: None) -> None:
    number = worker + i * workers
    behind = refs.bounds[1] + number - num_before
    token = jnp.where(number < num_before, number, behind)
    refs.out.at[token][...] = jnp.zeros(refs.out.shape[1:], jnp.float32)

    def clear(head: jax.Array, _: None) -> None:
      refs.lse[token, head] = jnp.float32(-jnp.inf)

    lax.fori_loop(0, g.num_q_heads, clear, None)

  count = lax.div(num_padding - worker + workers - 1, workers)
  lax.fori_loop(0, jnp.maximum(count, 0), step, None)
