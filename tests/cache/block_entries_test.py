import numpy as np
import pytest

from infinite_llm.cache.block_entries import BlockEntries, EntrySpan
from infinite_llm.errors import InvariantError


def test_a_span_stays_as_it_is_whatever_is_appended():
  log = BlockEntries([5, 3], [0, 2])
  span = EntrySpan(log=log, begin=1, end=2)
  block_ids, logical_ids = span.block_ids, span.logical_ids

  for n in range(3, 100):  # Beyond its first room, more than once.
    log.append([n], [n])

  assert block_ids.dtype == logical_ids.dtype == np.int32
  assert (block_ids.tolist(), logical_ids.tolist()) == ([3], [2])
  assert (span.block_ids.tolist(), span.logical_ids.tolist()) == ([3], [2])
  assert EntrySpan(log=log, begin=0, end=len(log)).logical_ids.tolist() == [
    0,
    2,
    *range(3, 100),
  ]


def test_what_was_read_cannot_be_written_to():
  span = EntrySpan.of([5], [0])

  with pytest.raises(ValueError, match="read-only"):
    span.block_ids[0] = 6


def test_a_span_is_cut_at_a_logical_number():
  span = EntrySpan.of([9, 8, 7, 6], [1, 3, 5, 7])

  assert span.below(5).block_ids.tolist() == [9, 8]
  assert span.below(6).block_ids.tolist() == [9, 8, 7]
  assert EntrySpan(log=span.log, begin=1, end=3).below(
    100
  ).logical_ids.tolist() == [3, 5]
  assert len(span.below(1)) == 0


def test_nothing_appended_changes_nothing():
  log = BlockEntries()
  log.append([], [])
  assert len(log) == 0


@pytest.mark.parametrize("logical_ids", [[1, 2], [4, 3]])
def test_logical_numbers_never_fall(logical_ids):
  log = BlockEntries([5, 6], [0, 3])

  with pytest.raises(InvariantError, match=r"must not fall; .* after 3"):
    log.append([7, 8], logical_ids)
  assert len(log) == 2


@pytest.mark.parametrize("span", [(0, 3), (2, 1), (-1, 1)])
def test_a_span_beyond_the_log_is_refused(span):
  with pytest.raises(InvariantError, match=r"must lie in \[0, 2\)"):
    BlockEntries([5, 6], [0, 3]).read(*span)
