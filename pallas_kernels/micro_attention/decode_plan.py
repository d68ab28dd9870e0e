"""Cuts the work of ragged decode evenly over the workers of a device.

A row's context is cut into tiles of KV tokens. An *item* is one KV head, some
of its query heads and some query tokens of a row, with all the row's tiles;
items stand one row after another. Each worker takes an equal run of tiles,
whichever items those belong to, so that one row of a million tokens beside many
short ones leaves nobody idle. At most one item begins before a worker's run,
and at most one ends after it.

All of this is arithmetic on tables that every layer of a model shares: in a
jitted step it is computed once, on the device, and nothing waits for the host.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_NOWHERE = 2**31 - 1  # Behind every position, and every entry.


class WorkerField(enum.IntEnum):
  """Columns of `Plan.workers`."""

  ROW = 0  # Row of the first item.
  ITEM = 1  # Number of the first item within its row.
  TILE = 2  # First tile within the first item.
  NUM_TILES = 3  # Tiles of the whole run.
  OWNER = 4  # Worker at which the first item begins.
  LAST = 5  # Worker at which the last item ends.


class RowField(enum.IntEnum):
  """Columns of `Plan.rows`."""

  FIRST_ENTRY = 0
  NUM_ENTRIES = 1
  NUM_TILES = 2
  FIRST_QUERY = 3
  NUM_QUERIES = 4
  NEXT_ROW = 5  # The next row that has tiles.


class Plan(NamedTuple):
  """Who does what.

  Attributes:
    workers: `[W, 8]` int32. The run of each worker, by `WorkerField`.
    rows: `[B, 8]` int32. What is to know of each row, by `RowField`.
  """

  workers: jax.Array
  rows: jax.Array


def in_reach(
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  tables: BlockTables,
  *,
  block_size: int,
  max_query_tokens: int,
  sliding_window: int,
) -> BlockTables:
  """Leaves out the entries at both ends of each row that no query sees.

  Where entries ascend by logical number, those are all that lie behind the
  window, or before the queries; in other orders some remain.

  Args:
    cu_seqlens: `[B + 1]` int32.
    q_positions: `[T]` int32.
    tables: Of `B` rows.
    block_size: Tokens per rBlock.
    max_query_tokens: Most query tokens of a row.
    sliding_window: Positions that a query sees.

  Returns:
    The tables with other `starts` and `counts`.
  """
  token = cu_seqlens[:-1, None] + jnp.arange(max_query_tokens, dtype=jnp.int32)
  position = q_positions.at[token].get(mode="clip")  # [B, max_query_tokens]
  is_query = (token < cu_seqlens[1:, None]) & (position >= 0)
  last = jnp.max(jnp.where(is_query, position, -1), axis=1)
  first = jnp.min(jnp.where(is_query, position, _NOWHERE), axis=1)

  entry = jnp.arange(tables.block_ids.shape[0], dtype=jnp.int32)
  of_row = entry - tables.starts[:, None]  # [B, E]
  of_row_exists = (of_row >= 0) & (of_row < tables.counts[:, None])
  start = tables.logical_ids * block_size
  # Differences, since a position and a window may add up to 2**31 and more.
  reach = min(sliding_window + block_size - 1, _NOWHERE)
  is_seen = (start <= last[:, None]) & (first[:, None] - start < reach)
  is_seen &= of_row_exists & (tables.block_ids != NULL_BLOCK_ID)
  begin = jnp.min(jnp.where(is_seen, of_row, _NOWHERE), axis=1)
  end = jnp.max(jnp.where(is_seen, of_row + 1, 0), axis=1)
  begin = jnp.minimum(begin, end)
  return tables._replace(starts=tables.starts + begin, counts=end - begin)


def make_plan(
  cu_seqlens: jax.Array,
  tables: BlockTables,
  *,
  num_workers: int,
  items_per_row: int,
  block_size: int,
  tile_tokens: int,
) -> Plan:
  """Cuts the work; `in_reach` may shorten the tables before.

  A row without queries, or without entries, has no tiles.

  Args:
    cu_seqlens: `[B + 1]` int32.
    tables: Of `B` rows.
    num_workers: `W`.
    items_per_row: KV heads times parts of their query heads and tokens.
    block_size: Tokens per rBlock.
    tile_tokens: Tokens per tile; divides `block_size` or is divided by it.

  Returns:
    The plan. All of it lies on the device.
  """
  num_queries = cu_seqlens[1:] - cu_seqlens[:-1]
  num_rows = num_queries.shape[0]
  if block_size >= tile_tokens:
    num_tiles = tables.counts * (block_size // tile_tokens)
  else:
    num_tiles = -(-tables.counts // (tile_tokens // block_size))
  has_tiles = (num_queries > 0) & (num_tiles > 0)
  num_tiles = jnp.where(has_tiles, num_tiles, 0)

  # Sums over comparisons rather than scans: they fuse into one small kernel.
  row = jnp.arange(num_rows, dtype=jnp.int32)
  is_before = row[None] < row[:, None]
  starts = jnp.sum(jnp.where(is_before, num_tiles[None], 0), axis=1)
  starts *= items_per_row
  total = items_per_row * jnp.sum(num_tiles)
  is_next = (row[None] > row[:, None]) & has_tiles[None]
  next_row = jnp.min(jnp.where(is_next, row[None], num_rows), axis=1)
  next_row = jnp.minimum(next_row, num_rows - 1)

  share, rest = total // num_workers, total % num_workers
  worker = jnp.arange(num_workers, dtype=jnp.int32)
  first = worker * share + jnp.minimum(worker, rest)
  run = share + (worker < rest)
  final = jnp.maximum(first + run - 1, first)

  def locate(tile: jax.Array) -> tuple[jax.Array, ...]:
    """Row, item in the row and tile in the item of tiles `[W]`."""
    begins = (starts[None] <= tile[:, None]) & has_tiles[None]
    its_row = jnp.max(jnp.where(begins, row[None], 0), axis=1)
    in_row = tile - starts[its_row]
    tiles = jnp.maximum(num_tiles[its_row], 1)
    return its_row, in_row // tiles, in_row % tiles

  def holder(tile: jax.Array) -> jax.Array:
    """The worker in whose run tiles `[W]` lie."""
    large = rest * (share + 1)
    in_small = rest + (tile - large) // jnp.maximum(share, 1)
    return jnp.where(tile < large, tile // (share + 1), in_small)

  first_row, first_item, first_tile = locate(first)
  final_row, _, final_tile = locate(final)
  last_end = final - final_tile + num_tiles[final_row] - 1
  zero = jnp.zeros_like(worker)
  workers = [
    first_row,
    first_item,
    first_tile,
    run,
    holder(first - first_tile),
    holder(last_end),
    zero,
    zero,
  ]
  rows = [
    tables.starts,
    tables.counts,
    num_tiles,
    cu_seqlens[:-1],
    num_queries,
    next_row,
    jnp.zeros_like(row),
    jnp.zeros_like(row),
  ]
  return Plan(
    workers=jnp.stack(workers, axis=1).astype(jnp.int32),
    rows=jnp.stack(rows, axis=1).astype(jnp.int32),
  )
