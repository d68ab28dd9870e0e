"""Table entries as an append-only log, and spans of it.

A table changes by a few entries per step and may have millions. What was
written to a log is never written again, so a span of it can be kept, compared
and mirrored on a device by what came after it was last looked at.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infinite_llm.errors import InvariantError
from infinite_llm.types import value_type

_FIRST_CAPACITY = 16


class BlockEntries:
  """Growing log of `(block_id, logical_id)` pairs.

  Two logs are equal only if they are the same object. The logical numbers of a
  log never fall, so that a span can be cut at one of them by bisection.
  """

  def __init__(
    self, block_ids: Sequence[int] = (), logical_ids: Sequence[int] = ()
  ):
    """Makes a log with some entries.

    Args:
      block_ids: rBlocks of one pool.
      logical_ids: Number of each in its request, never falling.
    """
    capacity = max(_FIRST_CAPACITY, len(block_ids))
    self._pairs = np.zeros((2, capacity), np.int32)
    self._size = 0
    self._last_id = 0
    self.append(block_ids, logical_ids)

  def __len__(self) -> int:
    return self._size

  @property
  def last_id(self) -> int:
    """Highest logical number; 0 while there is none."""
    return self._last_id

  def append(
    self, block_ids: Sequence[int], logical_ids: Sequence[int]
  ) -> None:
    """Adds entries behind the last one, in time O(new), amortised.

    Args:
      block_ids: rBlocks of one pool.
      logical_ids: Number of each in its request: none below the one before.

    Raises:
      InvariantError: If the logical numbers fall.
    """
    if not block_ids:
      return
    last_id = self._last_id
    for logical_id in logical_ids:
      if logical_id < last_id:
        raise InvariantError(
          f"logical_ids must not fall; got {list(logical_ids)} after"
          f" {self._last_id}."
        )
      last_id = logical_id
    end = self._size + len(block_ids)
    if end > self._pairs.shape[1]:
      grown = np.zeros((2, max(end, 2 * self._pairs.shape[1])), np.int32)
      grown[:, : self._size] = self._pairs[:, : self._size]
      self._pairs = grown
    self._pairs[:, self._size : end] = block_ids, logical_ids
    self._size = end
    self._last_id = last_id

  def read(self, begin: int, end: int) -> NDArray[np.int32]:
    """The entries `[begin, end)`.

    Returns:
      `[2, end - begin]` int32, not to be written to: `block_ids` and
      `logical_ids`. It stays as it is whatever is appended.
    """
    if not 0 <= begin <= end <= self._size:
      raise InvariantError(
        f"A span must lie in [0, {self._size}); got [{begin}, {end})."
      )
    pairs = self._pairs[:, begin:end]
    pairs.flags.writeable = False
    return pairs


@value_type
class EntrySpan:
  """Entries of one table: a part of a log.

  Attributes:
    log: The log.
    begin: First entry of it.
    end: One past the last entry.
  """

  log: BlockEntries
  begin: int
  end: int

  @classmethod
  def of(
    cls, block_ids: Sequence[int] = (), logical_ids: Sequence[int] = ()
  ) -> "EntrySpan":
    """All of a new log."""
    log = BlockEntries(block_ids, logical_ids)
    return cls(log=log, begin=0, end=len(log))

  def __len__(self) -> int:
    return self.end - self.begin

  @property
  def block_ids(self) -> NDArray[np.int32]:
    """`[n]` int32 rBlocks; read only."""
    return self.log.read(self.begin, self.end)[0]

  @property
  def logical_ids(self) -> NDArray[np.int32]:
    """`[n]` int32 number of each in its request, never falling; read only."""
    return self.log.read(self.begin, self.end)[1]

  def below(self, logical_id: int) -> "EntrySpan":
    """The entries whose logical number is below one, in O(log n)."""
    log = self.log
    # Mostly all of them, which needs no look into the array.
    is_all = self.end == len(log) and log.last_id < logical_id
    if is_all or self.begin == self.end:
      return self
    count = int(self.logical_ids.searchsorted(logical_id))
    return EntrySpan(log=log, begin=self.begin, end=self.begin + count)
