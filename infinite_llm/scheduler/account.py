"""A debtor's books of one request."""

import dataclasses
import enum

from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.lease_messages import (
  Grant,
  SlotName,
)
from infinite_llm.types import BlockId, Epoch, InstanceId, value_type


class Phase(enum.Enum):
  """What is under way with a request's rBlocks: one thing at a time.

  A borrow goes ASKING, RESERVING, MOVING, COMMITTING, SWITCHED, and from there
  to the next candidate or to IDLE; if it fails after the reservation, RETURNING
  gives the grants back first. A recall goes FETCHING, SWITCHED, RETURNING; if
  it fails, it ends at once and a sync follows. What comes back from the HOST
  tier goes SWAPPING_IN, SWAPPED_IN, and what goes there of a request that is
  larger than all HBM within its reach, OVERFLOWING.
  """

  IDLE = "idle"
  ASKING = "asking the gManager for candidates"
  RESERVING = "awaiting a creditor's grants"
  MOVING = "awaiting the exchange"
  COMMITTING = "awaiting the creditor's new table"
  SWITCHED = "awaiting the proof of the moved copies"
  FETCHING = "awaiting payloads from a creditor"
  RETURNING = "awaiting the end of returned leases"
  SYNCING = "awaiting that creditors install their tables anew"
  SWAPPING_IN = "awaiting copies from the HOST tier"
  SWAPPED_IN = "awaiting the proof of copies from the HOST tier"
  OVERFLOWING = "awaiting copies of its oldest rBlocks to the HOST tier"


class Reconcile(enum.Enum):
  """What to do about a request whose step could not be proved."""

  RETRY = "retry"
  RECOMPUTE = "recompute"


@value_type
class SpillInfo:
  """How a group program names a request with rBlocks elsewhere.

  Attributes:
    slot: Its spill slot.
    slot_epoch: Epoch under which it has the slot.
    versions: Version of each creditor's hosted table to answer with.
  """

  slot: int
  slot_epoch: Epoch
  versions: dict[InstanceId, int]


@value_type
class PendingMove:
  """An rBlock with two copies, until one of them is given up.

  Attributes:
    move: What the data plane is asked to send.
    old: The copy to be given up once the other is proved.
    new: The other copy.
  """

  move: Move
  old: Location
  new: Location


@dataclasses.dataclass(kw_only=True)
class Borrow:
  """Progress of one borrow.

  Attributes:
    wanted: rBlocks still to be moved.
    candidates: Creditors not yet asked, best first, and for how many rBlocks to
      ask each at most.
    creditor: The one being dealt with.
    moves: What moves to it.
    unsent: Those of them whose payload was not exchanged yet.
    is_planned: The gManager named the creditor, so a refusal of this one says
      nothing about the others.
    num_moved: rBlocks that moved and were proved, over all creditors.
  """

  wanted: int
  candidates: list[tuple[InstanceId, int]] = dataclasses.field(
    default_factory=list[tuple[InstanceId, int]]
  )
  creditor: InstanceId | None = None
  moves: list[PendingMove] = dataclasses.field(
    default_factory=list[PendingMove]
  )
  unsent: set[Move] = dataclasses.field(default_factory=set[Move])
  is_planned: bool = False
  num_moved: int = 0


@value_type
class Recall:
  """One recall.

  Attributes:
    creditor: Who sends the rBlocks.
    moves: What comes home from it.
  """

  creditor: InstanceId
  moves: list[PendingMove]


@dataclasses.dataclass(kw_only=True, eq=False)
class Account:
  """Where the rBlocks of one request are, and what is being done about them.

  Attributes:
    table: Where its rBlocks lie.
    num_live: rBlocks from the first on whose content was proved.
    num_proved_tokens: Tokens whose KV was proved.
    slot: Its spill slot; None while it has nothing elsewhere.
    leases: Grants that it holds at each creditor, in use or not.
    versions: Version of each creditor's hosted table that steps are to name.
    phase: What is under way.
    overflows: It is larger than all HBM within its reach, and may have rBlocks
      in HOST while it runs.
    borrow: The borrow that is under way, if one is.
    recall: The recall that is under way, if one is.
    unsynced: Creditors that have not answered a sync.
    must_sync: A sync is due once nothing else is under way.
    has_synced: One was made since a step last succeeded.
    is_lost: Some of its rBlocks are gone; only recomputing helps.
    num_refuted: Times that moved copies could not be proved since anything
      last was.
    is_closed: The request is over; what is left is to give back its leases.
  """

  table: BlockTable
  num_live: int = 0
  num_proved_tokens: int = 0
  slot: SlotName | None = None
  leases: dict[InstanceId, dict[BlockId, Epoch]] = dataclasses.field(
    default_factory=dict[InstanceId, dict[BlockId, Epoch]]
  )
  versions: dict[InstanceId, int] = dataclasses.field(
    default_factory=dict[InstanceId, int]
  )
  phase: Phase = Phase.IDLE
  overflows: bool = False
  borrow: Borrow | None = None
  recall: Recall | None = None
  unsynced: set[InstanceId] = dataclasses.field(default_factory=set[InstanceId])
  must_sync: bool = False
  has_synced: bool = False
  is_lost: bool = False
  num_refuted: int = 0
  is_closed: bool = False

  def current_slot(self) -> SlotName:
    """The spill slot of a request that has, or is to get, rBlocks elsewhere."""
    if self.slot is None:
      raise InvariantError(
        f"Request {self.table.uid} has rBlocks elsewhere but no spill slot."
      )
    return self.slot

  def current_borrow(self) -> Borrow:
    """The borrow, in a phase that implies one."""
    if self.borrow is None:
      raise InvariantError(
        f"Request {self.table.uid} is {self.phase.value} without a borrow."
      )
    return self.borrow

  def current_recall(self) -> Recall:
    """The recall, in a phase that implies one."""
    if self.recall is None:
      raise InvariantError(
        f"Request {self.table.uid} is {self.phase.value} without a recall."
      )
    return self.recall

  def can_leave(self) -> bool:
    """Whether it is all in HBM at home, intact, and nothing is under way."""
    is_home = self.slot is None and not self.overflows
    return is_home and self.phase is Phase.IDLE and not self.is_lost

  def num_movable(self) -> int:
    """How many rBlocks may move away: those full, proved and at home."""
    return self.table.num_home_below(self._num_full_proved())

  def movable(self, limit: int) -> tuple[int, ...]:
    """Logical numbers of rBlocks that may move away, oldest first.

    Args:
      limit: How many at most.
    """
    entries = self.table.local_entries().below(self._num_full_proved())
    return tuple(entries.logical_ids[:limit].tolist())

  def resident_blocks(self) -> int:
    """rBlocks, if all are at home and nothing at all is under way; else 0.

    And 0 if it overflows.
    """
    if self.slot is not None or self.phase is not Phase.IDLE or self.overflows:
      return 0
    return 0 if self.is_lost or self.must_sync else self.table.num_blocks

  def is_settled(self) -> bool:
    """Whether the versions that a step would name are surely installed."""
    if self.is_lost or self.must_sync:
      return False
    if self.phase in (Phase.SYNCING, Phase.SWAPPING_IN):
      return False
    if self.phase is not Phase.RETURNING:
      return True
    # The release replaces the version that a step would name.
    creditor = (
      self.recall.creditor if self.recall else self.current_borrow().creditor
    )
    return creditor not in self.table.creditors()

  def add_leases(self, creditor: InstanceId, grants: tuple[Grant, ...]) -> None:
    """Notes grants of a creditor."""
    if grants:
      held = self.leases.setdefault(creditor, {})
      held.update({grant.block_id: grant.epoch for grant in grants})

  def end_leases(self, creditor: InstanceId, grants: tuple[Grant, ...]) -> None:
    """Notes that a creditor took grants back."""
    held = self.leases.get(creditor, {})
    for grant in grants:
      if held.get(grant.block_id) == grant.epoch:
        del held[grant.block_id]
    if not held:
      self.leases.pop(creditor, None)

  def grants_of(self, creditor: InstanceId) -> tuple[Grant, ...]:
    """The grants that it holds at a creditor."""
    return tuple(
      Grant(block_id=block_id, epoch=epoch)
      for block_id, epoch in self.leases.get(creditor, {}).items()
    )

  def _num_full_proved(self) -> int:
    return self.num_proved_tokens // self.table.block_size
