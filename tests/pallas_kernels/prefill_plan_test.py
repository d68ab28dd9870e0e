"""What the prefill kernel's plan promises, against what every query sees."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.micro_attention.cases import CASES, Case
from pallas_kernels.micro_attention.prefill_plan import Segments, make_plan
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_Q_TILE = 16
_BY_NAME = {case.name: case for case in CASES}
_PREFILL = [
  _BY_NAME[f"prefill_{name}"]
  for name in (
    "ragged",
    "permuted",
    "padded",
    "window",
    "parts_elsewhere",
    "hosted",
    "nothing_seen",
    "far",
    "block_256",
  )
]


def _plan(case: Case, kv_tile: int):
  inputs = case.make_inputs()
  plan = make_plan(
    inputs.cu_seqlens,
    inputs.q_positions,
    inputs.tables,
    block_size=case.block_size,
    q_tile=_Q_TILE,
    kv_tile=kv_tile,
    sliding_window=case.sliding_window,
  )
  return inputs, plan


def _meetings(plan):
  """Tile, row and segment of every meeting, in the order of the work."""
  segments = np.asarray(plan.segments)
  for tile, first, end in np.asarray(plan.tiles):
    for row in range(first, end):
      yield tile, row, Segments(*segments[tile + row])


def _sees(case: Case, inputs, row: int, query: int) -> np.ndarray:
  """Which tokens `[count * P]` of a row's entries a query sees."""
  tables = inputs.tables
  start, count = int(tables.starts[row]), int(tables.counts[row])
  entries = slice(start, start + count)
  positions = np.asarray(tables.logical_ids)[entries, None] * case.block_size
  positions = positions + np.arange(case.block_size)
  behind = int(inputs.q_positions[query]) - positions
  sees = (behind >= 0) & (behind < (case.sliding_window or np.inf))
  sees &= np.asarray(tables.block_ids)[entries, None] != NULL_BLOCK_ID
  return sees.reshape(-1)


@pytest.mark.parametrize("kv_tile", [16, 64])
@pytest.mark.parametrize("case", _PREFILL, ids=str)
def test_ranges_hold_all_that_is_seen_and_full_ones_nothing_else(case, kv_tile):
  inputs, plan = _plan(case, kv_tile)
  for tile, row, segment in _meetings(plan):
    queries = [
      t
      for t in range(tile * _Q_TILE, (tile + 1) * _Q_TILE)
      if t < inputs.q_positions.shape[0] and inputs.q_positions[t] >= 0
    ]
    own = range(segment.first_query, segment.end_query)
    for query in queries:
      seen = (
        _sees(case, inputs, row, query)
        if query in own
        else np.zeros(segment.num_entries * case.block_size, bool)
      )
      begin, end = segment.begin * kv_tile, segment.end * kv_tile
      assert not seen[:begin].any()
      assert not seen[end:].any()
      full = slice(segment.full_begin * kv_tile, segment.full_end * kv_tile)
      assert seen[full].all()
      assert full.stop <= max(seen.size, full.start)


@pytest.mark.parametrize("case", _PREFILL, ids=str)
def test_every_query_of_a_row_is_in_one_segment(case):
  inputs, plan = _plan(case, case.block_size)
  cu_seqlens = np.asarray(inputs.cu_seqlens)
  rows = np.full(inputs.q_positions.shape[0], -1)
  for _, row, segment in _meetings(plan):
    own = slice(segment.first_query, max(*segment[6:8]))
    assert (rows[own] == -1).all()
    rows[own] = row
  for row in range(len(cu_seqlens) - 1):
    assert (rows[cu_seqlens[row] : cu_seqlens[row + 1]] == row).all()
  assert (rows[cu_seqlens[-1] :] == -1).all()


def test_causal_prefill_masks_only_the_diagonal():
  case = dataclasses.replace(
    _BY_NAME["prefill_whole"], query_lens=(64,), kv_lens=(256,)
  )
  _, plan = _plan(case, 16)
  for tile, _, segment in _meetings(plan):
    assert (segment.begin, segment.full_begin) == (0, 0)
    assert segment.full_end == 12 + tile
    assert segment.end == 13 + tile


def test_a_window_leaves_out_what_is_behind_it():
  case = dataclasses.replace(
    _BY_NAME["prefill_whole"],
    query_lens=(16,),
    kv_lens=(512,),
    sliding_window=64,
  )
  _, plan = _plan(case, 16)
  ((_, _, segment),) = _meetings(plan)
  assert (segment.begin, segment.end) == (27, 32)
  assert (segment.full_begin, segment.full_end) == (28, 31)
  assert (segment.reach_begin, segment.reach_end) == (433, 511)


def test_longest_tiles_come_first():
  inputs, plan = _plan(_BY_NAME["prefill_many_tiles"], 16)
  work = dict.fromkeys(range(plan.tiles.shape[0]), 0)
  for tile, _, segment in _meetings(plan):
    work[int(tile)] += int(segment.end - segment.begin)
  order = [int(tile) for tile in np.asarray(plan.tiles)[:, 0]]
  assert sorted(order) == sorted(work)
  assert [work[tile] for tile in order] == sorted(work.values(), reverse=True)
  assert inputs.q_positions.shape[0] <= len(order) * _Q_TILE
