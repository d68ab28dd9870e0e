"""Where the rBlocks of one request lie, in the order of its tokens."""

import collections
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from infinite_llm.cache.content_tag import add_coverage, content_tag, mix_tag
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import InvariantError
from infinite_llm.types import InstanceId, RequestUid


class BlockTable:
  """Logical to physical: where each rBlock of a request lies.

  Also knows what a step over the request must prove to have read: the sum of
  the mixed content tags of its rBlocks (`DESIGN.md` section 5, rule 5).

  Attributes:
    uid: The request.
    home: The instance that runs it.
    block_size: P, tokens per rBlock.
  """

  def __init__(self, uid: RequestUid, home: InstanceId, block_size: int):
    """Makes an empty table.

    Args:
      uid: The request.
      home: The instance that runs it.
      block_size: P, tokens per rBlock.
    """
    self.uid = uid
    self.home = home
    self.block_size = block_size
    self._locations: list[Location] = []
    self._num_at: collections.Counter[InstanceId] = collections.Counter()
    # What each rBlock adds to coverage when full, and the sum over the first
    # `_num_summed` of them. The sum follows the demand, which moves by a block
    # at a time, so that a step over a million tokens does not add it all again.
    self._full_coverage: list[int] = []
    self._num_summed = 0
    self._sum = 0
    self._local: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None

  @property
  def num_blocks(self) -> int:
    """How many rBlocks the request has."""
    return len(self._locations)

  def append(self, locations: Iterable[Location]) -> None:
    """Adds rBlocks after the last one."""
    for location in locations:
      logical_id = self.num_blocks
      self._locations.append(location)
      self._num_at[location.instance] += 1
      self._full_coverage.append(self._coverage_of(logical_id, self.block_size))
    self._local = None

  def location(self, logical_id: int) -> Location:
    """Where a logical rBlock lies.

    Raises:
      InvariantError: If the request has no such rBlock.
    """
    if not 0 <= logical_id < self.num_blocks:
      raise InvariantError(
        f"logical_id must be in [0, {self.num_blocks}) for request {self.uid};"
        f" got {logical_id}."
      )
    return self._locations[logical_id]

  def switch(self, logical_id: int, new: Location) -> Location:
    """Names another copy of a logical rBlock from now on.

    Args:
      logical_id: Which one.
      new: Where the other copy lies.

    Returns:
      Where the copy lies that was named until now.
    """
    old = self.location(logical_id)
    self._locations[logical_id] = new
    self._num_at[old.instance] -= 1
    self._num_at[new.instance] += 1
    before = self._full_coverage[logical_id]
    after = self._coverage_of(logical_id, self.block_size)
    self._full_coverage[logical_id] = after
    if logical_id < self._num_summed:
      self._sum = add_coverage(self._sum, after - before)
    self._local = None
    return old

  def local_entries(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The rBlocks at home.

    Returns:
      `(block_ids, logical_ids)`, both `[num_local]` int32, by rising logical
      number. Not to be written to: they are kept until the table changes.
    """
    if self._local is None:
      logical_ids = [
        logical_id
        for logical_id, location in enumerate(self._locations)
        if location.instance == self.home
      ]
      block_ids = [self._locations[i].block_id for i in logical_ids]
      self._local = (
        np.asarray(block_ids, np.int32),
        np.asarray(logical_ids, np.int32),
      )
    return self._local

  def hosted_entries(
    self, instance: InstanceId
  ) -> tuple[tuple[int, Location], ...]:
    """The rBlocks on one instance, as `(logical_id, location)` in order."""
    return tuple(
      (logical_id, location)
      for logical_id, location in enumerate(self._locations)
      if location.instance == instance
    )

  def creditors(self) -> tuple[InstanceId, ...]:
    """Other instances that hold rBlocks of the request, by rising number."""
    return tuple(
      sorted(
        instance
        for instance, count in self._num_at.items()
        if count and instance != self.home
      )
    )

  def tag(self, logical_id: int, filled: int) -> int:
    """Content tag of an rBlock.

    Args:
      logical_id: Which one.
      filled: How many of its tokens are written.

    Returns:
      A uint32, never 0.
    """
    return content_tag(
      uid=self.uid,
      logical_id=logical_id,
      epoch=self.location(logical_id).epoch,
      filled=filled,
    )

  def demand(self, num_tokens: int) -> int:
    """Coverage that a step must reach, over all holders.

    Args:
      num_tokens: Tokens whose KV the step reads, its own included.

    Returns:
      The sum modulo 2**32 of the mixed tags of the rBlocks that hold them;
      all are full but perhaps the last.
    """
    num_full, rest = divmod(num_tokens, self.block_size)
    if num_full + bool(rest) > self.num_blocks:
      raise InvariantError(
        f"Request {self.uid} has {self.num_blocks} rBlocks of"
        f" {self.block_size} tokens, which cannot hold {num_tokens} tokens."
      )
    while self._num_summed < num_full:
      self._sum = add_coverage(self._sum, self._full_coverage[self._num_summed])
      self._num_summed += 1
    while self._num_summed > num_full:
      self._num_summed -= 1
      self._sum = add_coverage(
        self._sum, -self._full_coverage[self._num_summed]
      )
    if not rest:
      return self._sum
    return add_coverage(self._sum, self._coverage_of(num_full, rest))

  def _coverage_of(self, logical_id: int, filled: int) -> int:
    return mix_tag(self.tag(logical_id, filled), logical_id)
