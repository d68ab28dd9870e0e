"""What the warpgroups of the decode kernel share: arrays, and the walk."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.micro_attention.decode_geometry import Geometry
from pallas_kernels.micro_attention.decode_plan import RowField, WorkerField

NOWHERE = 2**31 - 1024
"""A position behind every query; room to add a tile."""


class Segment(NamedTuple):
  """A run of tiles of one item, as one worker meets it.

  Attributes:
    number: Segments of this worker before it.
    tiles_before: Tiles of this worker before it.
    row: The item's row.
    part: Number of the item's query heads among the parts of all KV heads.
    chunk: Number of the item's group of query tokens within the row.
    first_tile: Within the item.
    num_tiles: Of the segment.
    item_tiles: Of the item.
  """

  number: jax.Array
  tiles_before: jax.Array
  row: jax.Array
  part: jax.Array
  chunk: jax.Array
  first_tile: jax.Array
  num_tiles: jax.Array
  item_tiles: jax.Array


class Ring(NamedTuple):
  """Tiles in shared memory that one warpgroup fills and another empties.

  Attributes:
    smem: `[size, tile, D]`.
    full: Barriers `[size]`: a tile has come.
    empty: Barriers `[size]`: a tile was used.
    size: Tiles.
  """

  smem: Any
  full: Any
  empty: Any
  size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
  """What the kernel reads and writes.

  Attributes:
    workers: `[W, 8]` int32, global memory, as are those up to `v_scale`.
    rows: `[B, 8]` int32.
    has_entries: `[T]` int32. Whether a query's row has any entry; 0 for a query
      outside of every row.
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
    k_scale: `[K]` float32, or None: what keys are multiplied by.
    v_scale: `[K]` float32, or None.
    k: Ring of keys as the pool has them, shared memory, as are those below.
    v: Ring of values as products read them.
    narrow_v: Ring of values as the pool has them, which one warpgroup widens
      into `v`; None where the pool's dtype is the queries'.
    queries: Ring `[2, columns, D]` of an item's queries.
    handed: Ring `[1, D, columns]` float32, by which the second attending
      warpgroup hands its sums to the first; None where there is one.
    handed_sums: `[2, columns]` float32. Their tops and totals; or None.
    wide_k: `[2, tile, D]`. Widened keys of each attending warpgroup where they
      cannot stay in registers, in the interpreter; else None.
    reductions: `[2, 512]` float32. Scratch of each attending warpgroup
      for what it reduces over its warps; or None.
    p_smem: `[attending warpgroups, columns, tile]`. Weights of a tile.
    out_smem: `[columns, D]` float32.
    lse_smem: `[columns]` float32.
    first_smem: `[stages * copies]` int32. Position of each copy's first token.
    merged: Semaphores `[W]`: parts written for an item begun at a worker; None
      where blocks run one after another.
  """

  workers: Any
  rows: Any
  has_entries: Any
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
  k_scale: Any
  v_scale: Any
  k: Ring
  v: Ring
  narrow_v: Ring | None
  queries: Ring
  handed: Ring | None
  handed_sums: Any
  reductions: Any
  wide_k: Any
  p_smem: Any
  out_smem: Any
  lse_smem: Any
  first_smem: Any
  merged: Any = None


def walk(
  g: Geometry,
  refs: Refs,
  worker: jax.Array,
  visit: Callable[[Segment], None],
) -> jax.Array:
  """Visits the segments of a worker; returns their number."""
  num_tiles = refs.workers[worker, WorkerField.NUM_TILES]

  def step(carry):
    number, done, row, item, tile = carry
    item_tiles = refs.rows[row, RowField.NUM_TILES]
    segment_tiles = jnp.minimum(item_tiles - tile, num_tiles - done)
    visit(
      Segment(
        number=number,
        tiles_before=done,
        row=row,
        part=lax.div(item, g.chunks),
        chunk=lax.rem(item, g.chunks),
        first_tile=tile,
        num_tiles=segment_tiles,
        item_tiles=item_tiles,
      )
    )
    is_last = item == g.items_per_row - 1
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


def kv_head(g: Geometry, segment: Segment) -> jax.Array:
  """The KV head of an item."""
  return lax.div(segment.part, g.parts)


def query_tokens(
  g: Geometry, refs: Refs, segment: Segment
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
