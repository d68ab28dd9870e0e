"""Where the rBlocks of one request lie, in the order of its tokens."""

from collections.abc import Iterable

from infinite_llm.cache.block_entries import BlockEntries, EntrySpan
from infinite_llm.cache.content_tag import (
  add_coverage,
  content_tags,
  mix_tag,
  name_block,
  name_request,
  tag_content,
)
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import InvariantError
from infinite_llm.types import Epoch, InstanceId, RequestUid, Tier

_MANY = 8
"""Tags of so many rBlocks are faster computed together."""


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
    self._num_at: dict[InstanceId, int] = {home: 0}
    # What each rBlock adds to coverage when full, and the sum over the first
    # `_num_summed` of them. The sum follows the demand, which moves by a block
    # at a time, so that a step over a million tokens does not add it all again.
    self._full_coverage: list[int] = []
    self._num_summed = 0
    self._sum = 0
    # How many are in HOST, and what they add to coverage.
    self._num_host = 0
    self._host_sum = 0
    # The rBlocks at home in HBM: what a log has from `_local_begin` on.
    # Appending and moving the oldest one away leave the log as it is; after any
    # other change it is None until somebody asks.
    self._local: BlockEntries | None = BlockEntries()
    self._local_begin = 0
    # What tags are made of, and the tag that was last asked for: an rBlock
    # fills step by step, and is asked for twice a step.
    self._name = name_request(uid)
    self._named: tuple[int, Epoch] | None = None
    self._block_name = 0
    self._tagged: int | None = None
    self._tag = 0

  @property
  def num_blocks(self) -> int:
    """How many rBlocks the request has."""
    return len(self._locations)

  @property
  def is_home(self) -> bool:
    """Whether no other instance holds any of them."""
    return self._num_at[self.home] + self._num_host == len(self._locations)

  @property
  def num_host(self) -> int:
    """How many of them lie in HOST; all of those are full."""
    return self._num_host

  def append(self, locations: Iterable[Location]) -> None:
    """Adds rBlocks after the last one."""
    first = self.num_blocks
    self._locations += locations
    added = range(first, self.num_blocks)
    for logical_id in added:
      self._count(self._locations[logical_id], 1)
    self._full_coverage += self._full_coverages(added)
    if self._local is not None:
      self._log_local(self._local, added)

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
    self._count(old, -1)
    self._count(new, 1)
    before = self._full_coverage[logical_id]
    after = self._coverage_of(logical_id, self.block_size)
    if old.tier is Tier.HOST:
      self._host_sum = add_coverage(self._host_sum, -before)
    if new.tier is Tier.HOST:
      self._host_sum = add_coverage(self._host_sum, after)
    self._full_coverage[logical_id] = after
    if logical_id < self._num_summed:
      self._sum = add_coverage(self._sum, after - before)
    if self.home in (old.instance, new.instance):
      self._follow_switch(logical_id, new)
    return old

  def local_entries(self) -> EntrySpan:
    """The rBlocks at home in HBM, by rising logical number.

    In O(1), except after a change other than an append and the move of the
    oldest one away.
    """
    if self._local is None:
      self._local = BlockEntries()
      self._local_begin = 0
      self._log_local(self._local, range(self.num_blocks))
    local = self._local
    return EntrySpan(log=local, begin=self._local_begin, end=len(local))

  def hosted_entries(
    self, instance: InstanceId
  ) -> tuple[tuple[int, Location], ...]:
    """The rBlocks in one HBM, as `(logical_id, location)` in order."""
    return tuple(
      (logical_id, location)
      for logical_id, location in enumerate(self._locations)
      if location.instance == instance and location.tier is Tier.HBM
    )

  def creditors(self) -> tuple[InstanceId, ...]:
    """Other instances that hold rBlocks of the request, by rising number."""
    if self.is_home:  # As nearly always.
      return ()
    return tuple(
      sorted(
        instance
        for instance, count in self._num_at.items()
        if count and instance != self.home
      )
    )

  def num_at(self, instance: InstanceId) -> int:
    """How many rBlocks of the request lie in an instance's HBM."""
    return self._num_at.get(instance, 0)

  def num_home_below(self, logical_id: int) -> int:
    """How many rBlocks at home in HBM have a logical number below one."""
    if self.is_home and not self._num_host:
      return min(logical_id, self.num_blocks)
    return len(self.local_entries().below(logical_id))

  def tag(self, logical_id: int, filled: int) -> int:
    """Content tag of an rBlock.

    Args:
      logical_id: Which one.
      filled: How many of its tokens are written.

    Returns:
      A uint32, never 0.
    """
    place = logical_id, self.location(logical_id).epoch
    if place != self._named:
      self._named, self._tagged = place, None
      self._block_name = name_block(self._name, *place)
    if filled != self._tagged:
      self._tagged = filled
      self._tag = tag_content(self._block_name, filled)
    return self._tag

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

  def demand_of_hbm(self, num_tokens: int) -> int:
    """As `demand`, but what lies in HOST, all of it below, is not read."""
    return add_coverage(self.demand(num_tokens), -self._host_sum)

  def _count(self, location: Location, change: int) -> None:
    if location.tier is Tier.HOST:
      self._num_host += change
    else:
      instance = location.instance
      self._num_at[instance] = self._num_at.get(instance, 0) + change

  def _log_local(self, log: BlockEntries, logical_ids: Iterable[int]) -> None:
    """Appends those of some rBlocks that are at home in HBM."""
    local = [i for i in logical_ids if self._is_local(self._locations[i])]
    log.append([self._locations[i].block_id for i in local], local)

  def _follow_switch(self, logical_id: int, new: Location) -> None:
    """Keeps the log where an rBlock left home that was the first of it."""
    if self._local is None:
      return
    local = self.local_entries()
    if not self._is_local(new) and local.logical_ids[0] == logical_id:
      self._local_begin += 1
    else:
      self._local = None

  def _is_local(self, location: Location) -> bool:
    return location.instance == self.home and location.tier is Tier.HBM

  def _full_coverages(self, logical_ids: range) -> list[int]:
    """What each of some rBlocks adds to coverage when it is full."""
    if len(logical_ids) < _MANY:
      return [self._coverage_of(i, self.block_size) for i in logical_ids]
    tags = content_tags(
      uid=self.uid,
      logical_ids=logical_ids,
      epochs=[self._locations[i].epoch for i in logical_ids],
      filled=self.block_size,
    )
    return [mix_tag(tag, i) for tag, i in zip(tags, logical_ids, strict=True)]

  def _coverage_of(self, logical_id: int, filled: int) -> int:
    return mix_tag(self.tag(logical_id, filled), logical_id)
