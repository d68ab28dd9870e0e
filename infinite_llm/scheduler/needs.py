"""How many rBlocks the requests of an instance have, lack and are to get."""

from collections.abc import Iterable, Mapping, Sequence

from infinite_llm.scheduler.condition import Demand
from infinite_llm.scheduler.request import Request
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.types import RequestUid


class Needs:
  """Counts rBlocks of requests by the tables of their rManager."""

  def __init__(self, rmanager: RManager, block_size: int):
    """Keeps what it counts by.

    Args:
      rmanager: The instance's manager.
      block_size: P, tokens per rBlock.
    """
    self._rmanager = rmanager
    self._block_size = block_size

  def capacity_tokens(self, request: Request) -> int:
    """Tokens that a request's rBlocks hold."""
    table = self._rmanager.table(request.uid)
    return table.num_blocks * self._block_size

  def missing(self, request: Request, num_tokens: int) -> int:
    """rBlocks that a request lacks for its first tokens."""
    num_blocks = self._rmanager.table(request.uid).num_blocks
    return max(self._num_blocks(num_tokens) - num_blocks, 0)

  def promised(self, running: Mapping[RequestUid, Request]) -> int:
    """rBlocks that requests are still to get for their prompts."""
    prompts = (r for r in running.values() if r.num_uncomputed > 1)
    return self._lacking(prompts)

  def lacking(self, running: Mapping[RequestUid, Request]) -> int:
    """The same, and what others are still to get for their next tokens."""
    return self._lacking(running.values())

  def demand(
    self, waiting: Sequence[Request], running: Mapping[RequestUid, Request]
  ) -> Demand:
    """What the rManager must keep, and the gManager be told of who waits."""
    first = waiting[0] if waiting else None
    needed_blocks = self._rmanager.overflow.needed_blocks
    return Demand(
      num_waiting=len(waiting),
      next_blocks=needed_blocks(first.num_tokens) if first else 0,
      next_arrival=first.arrival if first else 0,
      promised=self.promised(running),
      local_blocks=self._local_blocks(running) if first else 0,
    )

  def _local_blocks(self, running: Mapping[RequestUid, Request]) -> int:
    """rBlocks of running requests that are at home to the end."""
    manager, capacity = self._rmanager, self._rmanager.counts().total
    return sum(
      manager.table(uid).num_blocks
      for uid, request in running.items()
      if manager.spill(uid) is None
      and self._num_blocks(request.num_tokens) <= capacity
    )

  def _lacking(self, requests: Iterable[Request]) -> int:
    return sum(
      self._rmanager.overflow.room(
        request.uid, self.missing(request, request.num_coming_tokens)
      )
      for request in requests
    )

  def _num_blocks(self, num_tokens: int) -> int:
    return -(-num_tokens // self._block_size)
