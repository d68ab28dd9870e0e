"""Exact layout of small steps."""

import numpy as np
import pytest

from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.rblock import Location
from infinite_llm.cache.table_store import TableStore
from infinite_llm.engine.step_batch import (
  CheckRow,
  RowInput,
  build_batch,
  build_check,
  max_writes,
  pad_writes,
)
from infinite_llm.errors import InvariantError

P = 8
OUT_OF_RANGE = np.iinfo(np.int32).max


def table_of(*places, uid=7):
  """A table of instance 0, from `(instance, block_id)` of each rBlock."""
  table = BlockTable(uid, 0, P)
  table.append(
    Location(instance=instance, block_id=block_id, epoch=block_id)
    for instance, block_id in places
  )
  return table


def batch_of(rows, store, num_tokens, num_rows):
  starts = store.sync([row.entries() for row in rows])
  return build_batch(
    rows,
    starts,
    store.take_writes(),
    num_tokens=num_tokens,
    num_rows=num_rows,
    block_size=P,
  )


def test_rows_name_their_entries_and_bring_those_that_are_new():
  store = TableStore(32)
  long = table_of((1, 4), (0, 5), (0, 6), (0, 9))
  short = table_of((0, 3), uid=8)
  rows = [RowInput([11], 2 * P + 2, long), RowInput([12], 0, short)]

  batch = batch_of(rows, store, 3, 3)

  # rBlock 9 holds nothing yet; each log has room for twice its entries.
  assert batch.starts.tolist() == [0, 4, 0]
  assert batch.counts.tolist() == [2, 1, 0]
  assert batch.writes.at.tolist() == [0, 1, 4]
  assert batch.writes.block_ids.tolist() == [5, 6, 3]
  assert batch.writes.logical_ids.tolist() == [1, 2, 0]
  assert batch.demand.tolist() == [long.demand(2 * P + 3), short.demand(1), 0]
  assert batch.append_block.tolist() == [6, 3, 0]
  assert batch.append_offset.tolist() == [2, 0, 0]

  again = batch_of(rows, store, 3, 3)
  assert again.starts.tolist() == [0, 4, 0]
  assert again.writes.at.tolist() == [OUT_OF_RANGE] * 3


def test_a_chunk_writes_the_rblocks_that_it_touches():
  table = table_of((0, 5), (0, 6), (0, 7))
  rows = [RowInput(range(P + 2), P - 1, table)]

  batch = batch_of(rows, TableStore(32), 16, 2)

  assert batch.cu_seqlens.tolist() == [0, P + 2, P + 2]
  assert batch.positions.tolist() == [*range(P - 1, 2 * P + 1), *[-1] * 6]
  assert batch.append_block[: P + 2].tolist() == [5, *[6] * P, 7]
  writes = batch.tag_block.size
  assert writes == max_writes(16, 2, P) == batch.writes.at.size == 6
  assert batch.tag_block.tolist() == [5, 6, 7, 0, 0, 0]
  assert batch.tag_value[:3].tolist() == [
    table.tag(0, P),
    table.tag(1, P),
    table.tag(2, 1),
  ]
  assert batch.counts.tolist() == [3, 0]


def test_a_check_has_its_requests_in_the_rows_of_their_slots():
  store = TableStore(32)
  table = table_of((1, 4), (0, 5), (0, 6))
  checks = [CheckRow(2, table, 2 * P)]

  starts = store.sync([check.entries() for check in checks])
  batch = build_check(checks, starts, num_rows=4)

  assert batch.starts.tolist() == [0, 0, 0, 0]
  assert batch.counts.tolist() == [0, 0, 1, 0]
  assert batch.demand.tolist() == [0, 0, table.demand(2 * P), 0]


def test_more_writes_than_a_program_takes_are_refused():
  store = TableStore(32)
  store.sync([table_of(*((0, n) for n in range(1, 6))).local_entries()])

  with pytest.raises(InvariantError, match=r"takes 4 .* at most; got 5"):
    pad_writes(store.take_writes(), 4)
