"""Host mirror of the table entries that lie on one instance's devices.

Beside a pool lies one pair of arrays with the entries of all tables over it,
the instance's own and those that it hosts. A step brings only what is new: the
store knows where each log lies and how far it was written.
"""

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infinite_llm.cache.block_entries import BlockEntries, EntrySpan
from infinite_llm.errors import InvariantError


class EntryWrites(NamedTuple):
  """Changes to make on the devices, each at another place.

  Attributes:
    at: `[W]` int32 where to write; a place past the end pads.
    block_ids: `[W]` int32 rBlocks.
    logical_ids: `[W]` int32 number of each in its request.
  """

  at: NDArray[np.int32]
  block_ids: NDArray[np.int32]
  logical_ids: NDArray[np.int32]


def table_capacity(num_blocks: int) -> int:
  """E: entries that the devices have room for beside a pool.

  Args:
    num_blocks: N, rBlocks of the pool.

  Returns:
    Two and a half times N. `TableStore` says why that is enough.
  """
  return 5 * num_blocks // 2


@dataclasses.dataclass(kw_only=True, slots=True)
class _Extent:
  """Where a log lies.

  Attributes:
    start: Its place on the devices.
    room: Entries that fit there.
    base: Entry of the log that lies at `start`.
    begin: First entry that was last asked for.
    written: One past the last entry that was written.
  """

  start: int
  room: int
  base: int
  begin: int
  written: int


_Parts = dict[BlockEntries, tuple[int, int]]
"""Logs and which part `[begin, end)` of each is needed."""


class TableStore:
  """Places logs on the devices, and tells what is to be written there.

  A log gets twice the room that it needs, behind all others; if that is used
  up, it moves there again. When the end is reached, everything is placed anew.

  What one program reads always fits into E = 5N/2 entries: each rBlock of the
  pool is named by one table of the instance or hosted for one slot, and by at
  most two versions of that slot's table, which makes 2N entries. Of the rest,
  at least N/2, placing anew gives half to the logs, by their length, and leaves
  half free. So at least N/72 entries are added before it happens again, and an
  entry costs at most about 150 writes, amortised. That is when all rBlocks are
  hosted under two versions without a common log; with one entry per rBlock it
  is about ten times.

  Attributes:
    generation: Rises when the pinned spans may lie elsewhere than before.
  """

  def __init__(self, num_blocks: int):
    """Makes a store that has nothing on the devices.

    Args:
      num_blocks: N, rBlocks of the pool.
    """
    self.generation = 0
    self._capacity = table_capacity(num_blocks)
    self._most_entries = 2 * num_blocks
    self._extents: weakref.WeakKeyDictionary[BlockEntries, _Extent] = (
      weakref.WeakKeyDictionary()
    )
    self._end = 0
    self._pinned: _Parts = {}
    self._are_pinned_placed = True
    self._pending: list[tuple[int, NDArray[np.int32]]] = []
    self._num_pending = 0

  @property
  def num_pending(self) -> int:
    """Writes that the devices still need."""
    return self._num_pending

  def pin(self, spans: Iterable[EntrySpan]) -> None:
    """Keeps spans on the devices from the next `sync` on, and no others.

    Args:
      spans: What programs may read that name none of them in `sync`.
    """
    self._pinned = _parts(spans)
    self._are_pinned_placed = False
    self.generation += 1

  def sync(self, spans: Sequence[EntrySpan]) -> list[int]:
    """Sees to it that spans, and all pinned ones, lie on the devices.

    They do once the pending writes are done. What was placed before may lie
    elsewhere afterwards, unless it is pinned or one of `spans`.

    Args:
      spans: What a program is about to read.

    Returns:
      Where each span starts.

    Raises:
      InvariantError: If they are more than there are rBlocks to name.
    """
    parts = _parts(spans)
    if not self._are_pinned_placed:
      parts = self._pinned | parts
    if not all(self._place(log, *part) for log, part in parts.items()):
      parts = self._pinned | parts
      self._place_anew(parts)
    self._are_pinned_placed = True
    for log, (_, end) in parts.items():
      self._write(log, end)
    return [self.start(span) for span in spans]

  def start(self, span: EntrySpan) -> int:
    """Where a span that was synced starts; 0 if it is empty."""
    if not len(span):
      return 0
    extent = self._extents[span.log]
    return extent.start + span.begin - extent.base

  def take_writes(self) -> EntryWrites:
    """Takes what is to be written, in any order, before anything is read."""
    pending, self._pending, self._num_pending = self._pending, [], 0
    if not pending:
      return EntryWrites(*np.zeros((3, 0), np.int32))
    pairs = np.concatenate([pairs for _, pairs in pending], axis=1)
    at = [np.arange(x.shape[1], dtype=np.int32) + start for start, x in pending]
    return EntryWrites(np.concatenate(at), pairs[0], pairs[1])

  def _place(self, log: BlockEntries, begin: int, end: int) -> bool:
    """Finds room for a part of a log; whether there is some."""
    extent = self._extents.get(log)
    is_there = (
      extent is not None
      and extent.base <= begin
      and end <= extent.base + extent.room
    )
    if is_there and extent is not None:
      extent.begin = begin
      return True
    room = 2 * (end - begin)
    if self._end + room > self._capacity:
      return False
    self._put(log, begin, room)
    return True

  def _put(self, log: BlockEntries, begin: int, room: int) -> None:
    self._extents[log] = _Extent(
      start=self._end, room=room, base=begin, begin=begin, written=begin
    )
    self._end += room

  def _place_anew(self, needed: _Parts) -> None:
    """Drops what nobody needs, and gives every other log more room."""
    others: _Parts = {
      log: (extent.begin, extent.written)
      for log, extent in self._extents.items()
      if log not in needed
    }
    # Those of requests that are not in this step; they had to be written again.
    # Logs of closed requests may still be known to somebody.
    if _size(others) + _size(needed) <= self._most_entries:
      needed = others | needed
    size = _size(needed)
    if size > self._most_entries:
      raise InvariantError(
        f"The tables of a program must name at most {self._most_entries}"
        f" rBlocks; got {size}."
      )
    spare = (self._capacity - size) // 2
    self._extents.clear()
    self._pending = []
    self._num_pending = 0
    self._end = 0
    self.generation += 1
    for log, (begin, end) in needed.items():
      count = end - begin
      self._put(log, begin, count + spare * count // max(size, 1))
      self._write(log, end)

  def _write(self, log: BlockEntries, end: int) -> None:
    extent = self._extents[log]
    if extent.written < end:
      at = extent.start + extent.written - extent.base
      self._pending.append((at, log.read(extent.written, end)))
      self._num_pending += end - extent.written
      extent.written = end


def _parts(spans: Iterable[EntrySpan]) -> _Parts:
  """The part of each log that some spans cover."""
  parts: _Parts = {}
  for span in spans:
    if len(span):
      begin, end = parts.get(span.log, (span.begin, span.end))
      parts[span.log] = min(begin, span.begin), max(end, span.end)
  return parts


def _size(parts: _Parts) -> int:
  return sum(end - begin for begin, end in parts.values())
