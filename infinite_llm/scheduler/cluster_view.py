"""What policies decide from: the cluster as the gManager knows it."""

import collections
import dataclasses

from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.messages import BlocksOf, RequestBlocks
from infinite_llm.types import InstanceId, value_type


@value_type
class LedgerLine:
  """One instance, as of its last heartbeat.

  Attributes:
    instance: Which one.
    incarnation: Rises each time its rManager starts anew.
    heard_s: When the gManager last heard of it, by the gManager's clock.
    capacity: rBlocks of its HBM pool, whoever holds them.
    free: rBlocks of those that nobody holds.
    lendable: rBlocks that it would lend.
    num_running: Requests that run on it: its batch.
    num_waiting: Requests that wait for rBlocks or for a place in the batch.
    next_blocks: rBlocks that the first of those needs; 0 if none waits.
    next_arrival: When that one came: lower numbers came first.
    promised: rBlocks that running requests are still to get.
    local_blocks: rBlocks of running requests that are all at home.
    debts: What each debtor has borrowed from it.
  """

  instance: InstanceId
  incarnation: int = 1
  heard_s: float = 0.0
  capacity: int
  free: int
  lendable: int
  num_running: int = 0
  num_waiting: int = 0
  next_blocks: int = 0
  next_arrival: int = 0
  promised: int = 0
  local_blocks: int = 0
  debts: BlocksOf = ()

  @property
  def use(self) -> float:
    """Share of its HBM pool that somebody holds, from 0 to 1."""
    return 1.0 - self.free / self.capacity if self.capacity else 1.0

  @property
  def own_capacity(self) -> int:
    """rBlocks that are free there, or soon will be.

    Long requests, its own and those of its debtors, may take minutes to end.
    """
    return self.free + self.local_blocks

  @property
  def own_room(self) -> int:
    """rBlocks free for more requests; below 0, running ones lack as many."""
    return self.free - self.promised


@value_type
class Placement:
  """Where the rBlocks of one request are.

  Attributes:
    owner: The instance that runs it.
    blocks: How many rBlocks it has with each holder, and how many could move.
  """

  owner: InstanceId
  blocks: RequestBlocks


@value_type
class ClusterView:
  """The ledger and the placement map at one moment.

  Attributes:
    lines: One per known instance.
    placements: One per running request.
    links: What moving costs.
  """

  lines: tuple[LedgerLine, ...]
  placements: tuple[Placement, ...] = ()
  links: LinkCosts = dataclasses.field(default_factory=LinkCosts)

  def by_owner(self) -> dict[InstanceId, list[Placement]]:
    """Placements of each owner that has any, by rising uid."""
    owned: collections.defaultdict[InstanceId, list[Placement]] = (
      collections.defaultdict(list)
    )
    for placement in self.placements:
      owned[placement.owner].append(placement)
    for placements in owned.values():
      placements.sort(key=lambda placement: placement.blocks.uid)
    return dict(owned)
