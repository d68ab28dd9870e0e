import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from infinite_llm.cache.block_entries import BlockEntries, EntrySpan
from infinite_llm.cache.table_store import TableStore, table_capacity
from infinite_llm.errors import InvariantError

N = 16


class Device:
  """Table entries as the devices have them, once the writes are done."""

  def __init__(self, store: TableStore, num_blocks: int):
    self._store = store
    self._pairs = np.full((2, table_capacity(num_blocks)), -1)
    self.num_written = 0

  def update(self) -> None:
    writes = self._store.take_writes()
    assert len(set(writes.at.tolist())) == len(writes.at)  # In any order.
    self._pairs[0, writes.at] = writes.block_ids
    self._pairs[1, writes.at] = writes.logical_ids
    self.num_written += len(writes.at)

  def has(self, span: EntrySpan, start: int) -> bool:
    here = self._pairs[:, start : start + len(span)]
    return np.array_equal(here, [span.block_ids, span.logical_ids])


def _span(first: int, count: int) -> EntrySpan:
  numbers = list(range(first, first + count))
  return EntrySpan.of(numbers, numbers)


def _longer(span: EntrySpan, count: int) -> EntrySpan:
  end = span.begin + int(span.logical_ids[-1]) + 1
  numbers = list(range(end, end + count))
  span.log.append(numbers, numbers)
  return EntrySpan(log=span.log, begin=span.begin, end=len(span.log))


def test_only_what_is_new_is_written():
  store = TableStore(N)
  span = _span(0, 5)

  assert store.sync([span]) == [0]
  assert store.take_writes().at.tolist() == [0, 1, 2, 3, 4]
  longer = _longer(span, 2)
  assert store.sync([longer]) == [0]
  writes = store.take_writes()
  assert writes.at.tolist() == [5, 6]
  assert writes.block_ids.tolist() == writes.logical_ids.tolist() == [5, 6]
  assert store.sync([longer]) == [0]
  assert store.num_pending == 0
  assert store.take_writes().at.tolist() == []


def test_entries_that_left_the_front_are_skipped():
  store = TableStore(N)
  span = _span(0, 5)
  store.sync([span])

  assert store.sync([EntrySpan(log=span.log, begin=2, end=5)]) == [2]
  assert store.num_pending == 5  # Those of the first call, untaken.


def test_a_part_further_to_the_front_is_placed_whole():
  store = TableStore(N)
  device = Device(store, N)
  span = _span(0, 5)
  store.sync([EntrySpan(log=span.log, begin=2, end=5)])

  (start,) = store.sync([span])
  device.update()

  assert device.has(span, start)


def test_versions_of_one_log_lie_at_one_place():
  store = TableStore(N)
  old = _span(0, 3)
  new = _longer(old, 2)
  store.pin([new, old])
  own = _span(10, 2)

  (start,) = store.sync([own])

  assert store.start(old) == store.start(new) == 0
  assert start == 2 * len(new)
  assert store.num_pending == len(new) + len(own)


def test_a_log_that_outgrew_its_room_moves():
  store = TableStore(N)
  device = Device(store, N)
  first, second = _span(0, 2), _span(10, 1)
  store.sync([first, second])

  first = _longer(first, 3)
  start, _ = store.sync([first, second])
  device.update()

  assert start == 2 * 2 + 2 * 1
  assert device.has(first, start)


def test_an_empty_span_lies_nowhere():
  store = TableStore(N)
  assert store.sync([EntrySpan.of()]) == [0]
  assert store.num_pending == 0


def test_what_was_placed_anew_lies_elsewhere_and_the_generation_tells():
  store = TableStore(N)
  device = Device(store, N)
  pinned = _span(100, N // 2)
  store.pin([pinned])
  store.sync([_span(0, 2)])  # Nobody keeps this one.
  generation = store.generation
  own = _span(0, N - 1)

  (start,) = store.sync([own])
  device.update()

  assert store.generation > generation
  assert device.has(own, start)
  assert device.has(pinned, store.start(pinned))


def test_logs_of_other_steps_are_kept_as_long_as_all_fit():
  store = TableStore(N)
  resting = _span(100, N // 2)
  store.sync([resting])
  store.sync([_span(0, 1)])
  store.sync([kept := _span(0, N)])  # Does not fit behind the others.
  store.take_writes()

  store.sync([resting])
  assert store.num_pending == 0
  store.sync([_span(200, 3 * N // 2)])  # Now they are more than rBlocks.
  store.take_writes()
  store.sync([resting])
  assert store.num_pending == N // 2
  assert len(kept) == N


def test_more_entries_than_rblocks_to_name_are_refused():
  store = TableStore(N)
  with pytest.raises(InvariantError, match=r"at most 32 rBlocks; got 33"):
    store.sync([_span(0, 2 * N + 1)])


@hypothesis.given(
  num_blocks=st.integers(2, 40),
  events=st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 2**16)), max_size=120
  ),
)
@hypothesis.settings(max_examples=300)
def test_the_devices_have_what_the_logs_say_whatever_came_before(
  num_blocks, events
):
  """Own tables and two versions of hosted ones, of at most N - 1 rBlocks."""
  store = TableStore(num_blocks)
  device = Device(store, num_blocks)
  own: list[EntrySpan] = []
  hosted: list[tuple[EntrySpan, EntrySpan | None]] = []
  over: list[EntrySpan] = []  # Of requests that somebody still remembers.
  num_added = 0
  for kind, number in events:
    room = num_blocks - 1 - sum(map(len, own))
    room -= sum(max(len(new), len(old or ())) for new, old in hosted)
    count = min(number % 7 + 1, room)
    if kind <= 2 and count > 0:
      added = _span(number, count)
      num_added += count
      if kind == 0:
        own.append(added)
      elif kind == 1:
        hosted.append((added, None))
      elif own:
        index = number % len(own)
        own[index] = _longer(own[index], count)
    elif kind == 3 and own:  # The oldest leave home.
      index = number % len(own)
      span = own[index]
      begin = min(span.begin + number % 3, span.end - 1)
      own[index] = EntrySpan(log=span.log, begin=begin, end=span.end)
    elif kind == 4 and own:  # A roll-back, or the end of a request.
      span = own.pop(number % len(own))
      over.append(span)
      if number % 2:
        own.append(EntrySpan.of(span.block_ids.tolist(), _numbers(span)))
        num_added += len(span)
    elif kind == 5 and hosted and count > 0:
      new, _ = hosted.pop(number % len(hosted))
      hosted.append((_longer(new, count), new))
      num_added += count
    elif kind == 6 and hosted:  # Installed anew; the previous one stays.
      new, _ = hosted.pop(number % len(hosted))
      hosted.append((EntrySpan.of(new.block_ids.tolist(), _numbers(new)), new))
      num_added += len(new)
    elif kind == 7 and hosted:
      hosted.pop(number % len(hosted))
    pinned = [span for pair in hosted for span in pair if span is not None]
    if kind in (1, 5, 6, 7):
      store.pin(pinned)
    generation = store.generation
    places = {
      id(span): store.start(span) for span in pinned if kind not in (1, 5, 6, 7)
    }
    step = own[number % 3 :]

    starts = store.sync(step)
    device.update()

    for span, start in zip(step, starts, strict=True):
      assert device.has(span, start)
    for span in pinned:
      assert device.has(span, store.start(span))
      if id(span) in places and store.generation == generation:
        assert store.start(span) == places[id(span)]
  assert device.num_written <= 150 * num_added


def _numbers(span: EntrySpan) -> list[int]:
  return span.logical_ids.tolist()


def test_long_decoding_writes_each_entry_a_few_times():
  """Requests that grow by an rBlock in turn, until the pool is full."""
  num_blocks = 4096
  store = TableStore(num_blocks)
  device = Device(store, num_blocks)
  logs = [BlockEntries() for _ in range(8)]
  for step in range(num_blocks - 1):
    log = logs[step % 8]
    log.append([step + 1], [step])
    span = EntrySpan(log=log, begin=0, end=len(log))
    (start,) = store.sync([span])
    device.update()
    assert device.has(span, start)
  assert device.num_written <= 6 * num_blocks
