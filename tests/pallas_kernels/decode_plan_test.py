"""The cut of ragged decode, and what it leaves out."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.decode_plan import (
  RowField,
  WorkerField,
  in_reach,
  make_plan,
)
from pallas_kernels.pool_layout import NULL_BLOCK_ID


def _ints(*values: int):
  return jnp.asarray(values, jnp.int32)


def _plan(counts, *, num_queries=None, num_workers=4, items_per_row=2):
  starts = np.cumsum([0, *counts[:-1]])
  tables = BlockTables(
    _ints(*range(1, sum(counts) + 1)),
    _ints(*range(sum(counts))),
    _ints(*starts),
    _ints(*counts),
  )
  num_queries = num_queries or [1] * len(counts)
  return make_plan(
    _ints(*np.cumsum([0, *num_queries])),
    tables,
    num_workers=num_workers,
    items_per_row=items_per_row,
    block_size=64,
    tile_tokens=128,
  )


@pytest.mark.parametrize(
  "counts", [(1000, 3, 3, 3), (1, 1), (7,), (0, 0, 0), (64,) * 9]
)
def test_workers_get_equal_runs_that_hold_all_tiles(counts):
  plan = _plan(counts)
  tiles = 2 * sum(-(-count // 2) for count in counts)
  runs = np.asarray(plan.workers)[:, WorkerField.NUM_TILES]
  assert runs.sum() == tiles
  assert runs.max() - runs.min() <= 1


def test_a_run_begins_where_the_one_before_ends():
  # Row 0 has two items of 2 tiles, row 1 two items of 1 tile; four workers.
  workers = np.asarray(_plan((4, 1)).workers)
  columns = [WorkerField.ROW, WorkerField.ITEM, WorkerField.TILE]
  np.testing.assert_array_equal(
    workers[:, columns], [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
  )
  np.testing.assert_array_equal(workers[:, WorkerField.NUM_TILES], [2, 2, 1, 1])


def test_rows_without_queries_or_entries_have_no_tiles():
  plan = _plan((4, 8, 0, 2), num_queries=[1, 0, 1, 1])
  rows = np.asarray(plan.rows)
  np.testing.assert_array_equal(rows[:, RowField.NUM_TILES], [2, 0, 0, 1])
  assert rows[0, RowField.NEXT_ROW] == 3


_TABLES = BlockTables(
  block_ids=_ints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
  logical_ids=_ints(0, 1, 2, 3, 4, 5, 30, 31, 40, 41),
  starts=_ints(0, 6),
  counts=_ints(6, 4),
)


def _in_reach(tables, cu_seqlens, q_positions, window):
  result = in_reach(
    cu_seqlens,
    q_positions,
    tables,
    block_size=16,
    max_query_tokens=2,
    sliding_window=window,
  )
  return result.starts.tolist(), result.counts.tolist()


@pytest.mark.parametrize(
  ("window", "starts", "counts"),
  [
    (1, [5, 9], [1, 1]),  # The rBlock of the query itself.
    (15, [5, 9], [1, 1]),
    (16, [4, 9], [2, 1]),  # Position 94 sees 79, the last of rBlock 4.
    (47, [3, 8], [3, 2]),
    (1000, [0, 6], [6, 4]),
    (2**31 - 1, [0, 6], [6, 4]),
  ],
)
def test_entries_behind_the_window_are_left_out(window, starts, counts):
  # Row 1 lacks rBlocks, as at a creditor: 41 ends at position 671.
  assert _in_reach(_TABLES, _ints(0, 1, 2), _ints(94, 671), window) == (
    starts,
    counts,
  )


def test_the_first_query_of_a_row_decides():
  assert _in_reach(_TABLES, _ints(0, 2, 3), _ints(79, 80, 671), 1) == (
    [4, 9],
    [2, 1],
  )


def test_padding_queries_see_nothing():
  _, counts = _in_reach(_TABLES, _ints(0, 2, 4), _ints(-1, 80, -1, -1), 1)
  assert counts == [1, 0]


def test_null_entries_at_the_ends_are_left_out():
  tables = _TABLES._replace(
    block_ids=_TABLES.block_ids.at[jnp.array([0, 3, 5])].set(NULL_BLOCK_ID)
  )
  assert _in_reach(tables, _ints(0, 1, 2), _ints(94, 671), 1000) == (
    [1, 6],
    [4, 4],
  )


def test_entries_in_any_order_keep_what_is_seen():
  tables = _TABLES._replace(logical_ids=_ints(5, 0, 4, 1, 2, 3, 30, 31, 40, 41))
  # Row 0 sees rBlocks 4 and 5: entries 0 to 2, and what lies between.
  assert _in_reach(tables, _ints(0, 1, 2), _ints(94, 671), 16) == (
    [0, 9],
    [3, 1],
  )
