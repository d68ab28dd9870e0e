"""The warpgroups of the decode kernel that bring keys and values."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention.decode_geometry import Geometry
from pallas_kernels.micro_attention.decode_plan import RowField
from pallas_kernels.micro_attention.mosaic_gpu_decode_walk import (
  NOWHERE,
  Refs,
  Ring,
  Segment,
  kv_head,
  query_tokens,
)
from pallas_kernels.pool_layout import NULL_BLOCK_ID


def copy(g: Geometry, refs: Refs, segment: Segment) -> None:
  """Brings an item's queries, and the segment's keys and values."""
  tile_tokens = g.tuning.tile_tokens
  k, v = refs.k, refs.narrow_v or refs.v
  q_slot = lax.rem(segment.number, 2)

  wait_until_empty(refs.queries, segment.number)
  first_head = pl.multiple_of(segment.part * g.group // 8 * 8, 8)
  for i, (token, _) in enumerate(query_tokens(g, refs, segment)):
    plgpu.copy_gmem_to_smem(
      refs.q.at[token, pl.ds(first_head, g.head_columns)],
      refs.queries.smem.at[q_slot, pl.ds(i * g.head_columns, g.head_columns)],
      refs.queries.full.at[q_slot],
    )

  first_entry = refs.rows[segment.row, RowField.FIRST_ENTRY]
  num_entries = refs.rows[segment.row, RowField.NUM_ENTRIES]
  head = kv_head(g, segment)
  last_entry = refs.block_ids.shape[0] - 1
  layer = refs.layer[0]
  steps = g.copies // g.copies_per_step  # Of one tile.

  def read(
    tile: jax.Array, first_copy: jax.Array
  ) -> list[tuple[jax.Array, jax.Array]]:
    """rBlock and first position of each copy that one step makes."""
    found = []
    for i in range(g.copies_per_step):
      entry = lax.div(tile, g.tiles_per_block) * g.copies + first_copy + i
      offset = lax.rem(tile, g.tiles_per_block) * tile_tokens
      index = jnp.clip(first_entry + entry, 0, last_entry)
      is_held = entry < num_entries
      block = jnp.where(is_held, refs.block_ids[index], NULL_BLOCK_ID)
      first = refs.logical_ids[index] * g.block_size + offset
      first = jnp.where(block == NULL_BLOCK_ID, NOWHERE, first)
      found.append((block, first))
    return found

  def copy(
    tile: jax.Array,
    slot: jax.Array,
    first_copy: jax.Array,
    copies: list[tuple[jax.Array, jax.Array]],
    ring: Ring,
    which: int,
  ) -> None:
    offset: int | jax.Array = 0
    if g.tiles_per_block > 1:
      offset = lax.rem(tile, g.tiles_per_block) * tile_tokens
      offset = pl.multiple_of(offset, tile_tokens)
    for i, (block, _) in enumerate(copies):
      index = (block * g.num_layers + layer) * 2 + which
      start = pl.multiple_of((first_copy + i) * g.copy_tokens, g.copy_tokens)
      plgpu.copy_gmem_to_smem(
        refs.pool.at[
          index * g.num_kv_heads + head, pl.ds(offset, g.copy_tokens)
        ],
        ring.smem.at[slot, pl.ds(start, g.copy_tokens)],
        ring.full.at[slot],
      )

  def step(i: jax.Array, _: None) -> None:
    in_segment = lax.div(i, steps)
    first_copy = lax.rem(i, steps) * g.copies_per_step
    is_new = first_copy == 0
    number = segment.tiles_before + in_segment
    slot = lax.rem(number, k.size)
    tile = segment.first_tile + in_segment
    copies = read(tile, first_copy)
    pl.when(is_new)(lambda: wait_until_empty(k, number))
    for j, (_, first) in enumerate(copies):
      refs.first_smem[slot * g.copies + first_copy + j] = first
    copy(tile, slot, first_copy, copies, k, 0)
    pl.when(is_new)(lambda: wait_until_empty(v, number))
    copy(tile, slot, first_copy, copies, v, 1)

  lax.fori_loop(0, segment.num_tiles * steps, step, None)


def widen(g: Geometry, narrow: Ring, wide: Ring, num_tiles: jax.Array) -> None:
  """Converts a worker's tiles of values to the queries' dtype.

  Args:
    g: What is static.
    narrow: The ring to empty.
    wide: The ring to fill.
    num_tiles: Of the worker.
  """
  parts = [
    (pl.ds(row, 64), pl.ds(column, min(g.head_dim, 128)))
    for row in range(0, g.tuning.tile_tokens, 64)
    for column in range(0, g.head_dim, 128)
  ]

  def step(number: jax.Array, _: None) -> None:
    slot = lax.rem(number, narrow.size)
    wide_slot = lax.rem(number, wide.size)
    plgpu.barrier_wait(narrow.full.at[slot])
    wait_until_empty(wide, number)
    # All loads before the first store, behind which they would have to wait.
    # In this layout a thread loads 32 bits.
    loaded = [
      plgpu.load(
        narrow.smem.at[slot, *part], layout=plgpu.Layout.WGMMA_UPCAST_2X
      )
      for part in parts
    ]
    for part, x in zip(parts, loaded, strict=True):
      wide.smem.at[wide_slot, *part][...] = x.astype(g.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(wide.full.at[wide_slot])
    plgpu.barrier_arrive(narrow.empty.at[slot])

  lax.fori_loop(0, num_tiles, step, None)
  drain(wide, num_tiles)


def wait_until_empty(ring: Ring, number: jax.Array) -> None:
  """Waits until a ring has room for its tile `number`."""

  @pl.when(number >= ring.size)
  def _():
    plgpu.barrier_wait(ring.empty.at[lax.rem(number, ring.size)])


def drain(ring: Ring, count: jax.Array) -> None:
  """Waits for the last uses of a ring into which `count` tiles went."""
  left = jnp.minimum(count, ring.size)

  def step(i: jax.Array, _: None) -> None:
    slot = lax.rem(count - left + i, ring.size)
    plgpu.barrier_wait(ring.empty.at[slot])

  lax.fori_loop(0, left, step, None)
