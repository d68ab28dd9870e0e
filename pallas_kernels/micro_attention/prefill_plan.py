"""What each tile of queries has to pass, for the prefill kernel.

Queries are cut into tiles of consecutive tokens, whatever rows they belong to,
so that each output is written by one tile and none is left out. A tile meets
the rows it overlaps one after another; such a meeting is a *segment*. KV tokens
of a row are cut into tiles as well, in the order of its entries. The plan
says which range of them a segment must pass, and in which part of that range
every query sees every token, so that nothing needs to be masked there.

Everything is computed on the device from a call's tables, in a few small
reductions that depend on no layer: the layers of a model share them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_FAR = 2**31 - 1


class Segments(NamedTuple):
  """Fields of a segment, in the order of `PrefillPlan.segments`.

  KV tiles are numbered from the row's first entry.

  Attributes:
    first_entry: First entry of the row.
    num_entries: Entries of the row.
    begin: First KV tile that any of its queries sees.
    full_begin: First KV tile that all of its queries see whole.
    full_end: End of those; the tiles in between are such too.
    end: End of the KV tiles that any of its queries sees.
    first_query: First query token.
    end_query: End of the query tokens.
    reach_begin: Lowest position that any query of the whole row sees.
    reach_end: Highest such position; tokens out of reach may be NaN.
  """

  first_entry: jax.Array
  num_entries: jax.Array
  begin: jax.Array
  full_begin: jax.Array
  full_end: jax.Array
  end: jax.Array
  first_query: jax.Array
  end_query: jax.Array
  reach_begin: jax.Array
  reach_end: jax.Array


class PrefillPlan(NamedTuple):
  """The work of one call, cut into `Q` tiles of queries.

  Attributes:
    q_positions: `[Q * tile]` int32. Positions; -1 pads, and stands for queries
      outside of every row.
    tiles: `[Q, 3]` int32. Tile and the range of rows that it meets, some of
      which may be empty; the tiles with most work come first.
    segments: `[Q + B, len(Segments)]` int32. Tile `i` meets row `b` in segment
      `i + b`: from one meeting to the next at least one of them grows.
  """

  q_positions: jax.Array
  tiles: jax.Array
  segments: jax.Array


def make_plan(
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  tables: BlockTables,
  *,
  block_size: int,
  q_tile: int,
  kv_tile: int,
  sliding_window: int | None,
) -> PrefillPlan:
  """Plans a call.

  Args:
    cu_seqlens: `[B + 1]` int32. As for `micro_attention`.
    q_positions: `[T]` int32. As for `micro_attention`.
    tables: Of `B` rows.
    block_size: Tokens per rBlock, `P`.
    q_tile: Query tokens per tile.
    kv_tile: KV tokens per tile: a multiple or a divisor of `P`.
    sliding_window: How many positions a query sees; None is all.

  Returns:
    The plan.
  """
  num_tokens, num_rows = q_positions.shape[0], tables.starts.shape[0]
  num_tiles = -(-num_tokens // q_tile)
  token = jnp.arange(num_tiles * q_tile, dtype=jnp.int32)
  positions = jnp.pad(
    q_positions, (0, token.size - num_tokens), constant_values=-1
  )
  in_a_row = (token >= cu_seqlens[0]) & (token < cu_seqlens[-1])
  positions = jnp.where(in_a_row, positions, -1)

  # Which rows each tile meets.
  tile = jnp.arange(num_tiles, dtype=jnp.int32)
  tile_begin = (tile * q_tile)[:, None]
  rows = jnp.stack(
    [
      jnp.sum(cu_seqlens[1:] <= tile_begin, axis=1, dtype=jnp.int32),
      jnp.sum(cu_seqlens[:-1] < tile_begin + q_tile, axis=1, dtype=jnp.int32),
    ],
    axis=1,
  )

  # Which tile and row each segment is. Numbers that are none stay in range, and
  # nobody reads them.
  segment = jnp.arange(num_tiles + num_rows, dtype=jnp.int32)
  first_segment = tile + rows[:, 0]
  tile_of = (
    jnp.sum(first_segment <= segment[:, None], axis=1, dtype=jnp.int32) - 1
  )
  tile_of = jnp.clip(tile_of, 0, num_tiles - 1)
  row_of = segment - tile_of
  is_segment = row_of < rows[tile_of, 1]
  row_of = jnp.clip(row_of, 0, num_rows - 1)

  # The queries of each segment.
  first_query = jnp.maximum(cu_seqlens[row_of], tile_of * q_tile)
  end_query = jnp.minimum(cu_seqlens[row_of + 1], (tile_of + 1) * q_tile)
  tokens = token.reshape(num_tiles, q_tile)[tile_of]
  tile_positions = positions.reshape(num_tiles, q_tile)[tile_of]
  is_query = tile_positions >= 0
  is_own = (tokens >= first_query[:, None]) & (tokens < end_query[:, None])
  is_own &= is_query & is_segment[:, None]
  lowest = jnp.min(jnp.where(is_own, tile_positions, _FAR), axis=1)
  highest = jnp.max(jnp.where(is_own, tile_positions, -1), axis=1)
  is_shared = jnp.any(is_query & ~is_own, axis=1)

  # The reach of each segment's row, over all of the row's segments.
  same_row = (row_of == row_of[:, None]) & is_segment
  reach_end = jnp.max(jnp.where(same_row, highest, -1), axis=1)
  reach_begin = jnp.min(jnp.where(same_row, lowest, _FAR), axis=1)
  if sliding_window is None:
    reach_begin = jnp.zeros_like(reach_begin)
  else:
    reach_begin -= sliding_window - 1

  # Which entries of its row a segment sees at all, and which ones whole.
  entry = jnp.arange(tables.block_ids.shape[0], dtype=jnp.int32)
  first_entry, num_entries = tables.starts[row_of], tables.counts[row_of]
  index = entry - first_entry[:, None]
  in_row = (index >= 0) & (index < num_entries[:, None])
  holds_kv = in_row & (tables.block_ids != NULL_BLOCK_ID)
  begin = tables.logical_ids * block_size
  end = begin + (block_size - 1)
  sees = holds_kv & (begin <= highest[:, None])
  sees_whole = holds_kv & (end <= lowest[:, None]) & ~is_shared[:, None]
  if sliding_window is not None:
    sees &= lowest[:, None] - end < sliding_window
    sees_whole &= highest[:, None] - begin < sliding_window
  begin = jnp.min(jnp.where(sees, index, _FAR), axis=1)
  end = jnp.max(jnp.where(sees, index, -1), axis=1) + 1
  full_begin = jnp.min(jnp.where(sees_whole, index, _FAR), axis=1)
  is_broken = in_row & ~sees_whole & (index >= full_begin[:, None])
  full_end = jnp.min(jnp.where(is_broken, index, num_entries[:, None]), axis=1)

  # From entries to KV tiles: those that touch what is seen, those inside of
  # what is seen whole.
  is_empty = end <= 0
  begin = jnp.where(is_empty, 0, begin)
  has_full = full_begin < _FAR
  full_begin = jnp.where(has_full, full_begin, begin)
  full_end = jnp.where(has_full, full_end, begin)
  begin = begin * block_size // kv_tile
  end = -(-end * block_size // kv_tile)
  full_begin = jnp.clip(-(-full_begin * block_size // kv_tile), begin, end)
  full_end = jnp.clip(full_end * block_size // kv_tile, full_begin, end)

  segments = Segments(
    first_entry=first_entry,
    num_entries=num_entries,
    begin=begin,
    full_begin=full_begin,
    full_end=full_end,
    end=end,
    first_query=first_query,
    end_query=end_query,
    reach_begin=reach_begin,
    reach_end=reach_end,
  )

  # Longest tiles first: what comes late then fills gaps.
  of_tile = (tile_of == tile[:, None]) & is_segment
  work = jnp.sum(jnp.where(of_tile, end - begin, 0), axis=1)
  goes_before = (work > work[:, None]) | (
    (work == work[:, None]) & (tile > tile[:, None])
  )
  rank = jnp.sum(goes_before, axis=1, dtype=jnp.int32)
  order = jnp.sum(
    jnp.where(rank == tile[:, None], tile, 0), axis=1, dtype=jnp.int32
  )
  tiles = jnp.concatenate([order[:, None], rows[order]], axis=1)
  return PrefillPlan(positions, tiles, jnp.stack(segments, axis=1))
