"""What the host knows of one rBlock."""

import collections
import dataclasses
import enum

from infinite_llm.types import (
  NO_EPOCH,
  BlockId,
  Epoch,
  InstanceId,
  RequestUid,
  Tier,
  value_type,
)

_HISTORY_LENGTH = 6


class BlockState(enum.StrEnum):
  """Who answers for an rBlock, and how far its content is proved.

  The owner's blocks go FREE, RESERVED, LIVE, FREE, with MOVING while a second
  copy exists elsewhere; a creditor's go FREE, RESERVED, HOSTED, FREE
  (`DESIGN.md` section 5, rule 1).
  """

  FREE = "free"
  RESERVED = "reserved"
  LIVE = "live"
  MOVING = "moving"
  HOSTED = "hosted"


@value_type
class Location:
  """Where an rBlock lies, and under which reservation.

  Attributes:
    instance: The instance that holds it.
    block_id: Its place in that instance's pool.
    epoch: Reservation epoch under which it was granted.
    tier: Which of the instance's memories.
  """

  instance: InstanceId
  block_id: BlockId
  epoch: Epoch
  tier: Tier = Tier.HBM


@dataclasses.dataclass(kw_only=True, slots=True)
class RBlock:
  """Metadata of one rBlock of a pool.

  Attributes:
    block_id: Its place in the pool.
    state: Where it is in its life.
    epoch: Epoch of the present reservation; `NO_EPOCH` when free.
    uid: Request whose KV it holds or will hold; None when free.
    owner: Instance that runs that request; None when free.
    history: Its last changes, oldest first, for error messages.
  """

  block_id: BlockId
  state: BlockState = BlockState.FREE
  epoch: Epoch = NO_EPOCH
  uid: RequestUid | None = None
  owner: InstanceId | None = None
  history: collections.deque[tuple[BlockState, RequestUid | None]] = (
    dataclasses.field(
      default_factory=lambda: collections.deque(maxlen=_HISTORY_LENGTH)
    )
  )

  def reserve(self, owner: InstanceId, uid: RequestUid, epoch: Epoch) -> None:
    """Promises the block to a request."""
    self.owner = owner
    self.uid = uid
    self.epoch = epoch
    self.enter(BlockState.RESERVED)

  def release(self) -> None:
    """Forgets whom the block belonged to; the history remembers."""
    self.enter(BlockState.FREE)
    self.owner = None
    self.uid = None
    self.epoch = NO_EPOCH

  def enter(self, state: BlockState) -> None:
    """Changes the state and notes it in the history."""
    self.state = state
    self.history.append((state, self.uid))

  def __str__(self) -> str:
    past = " -> ".join(
      f"{state.value} (request {uid})" for state, uid in self.history
    )
    return (
      f"rBlock {self.block_id} ({self.state.value}; owner: request {self.uid}"
      f" of instance {self.owner}; epoch {self.epoch}; history:"
      f" {past or 'never used'})"
    )
