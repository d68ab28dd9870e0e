"""What a history of leases is made of."""

import dataclasses

from infinite_llm.scheduler.lease_messages import SlotName
from infinite_llm.types import BlockId, Epoch, InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
  """One thing that happened to the leases of a creditor.

  Attributes:
    time_s: When, by the creditor's clock.
    creditor: Who lends.
    owner: Who borrows.
    incarnation: The owner's.
    name: What happened.
    grants: `(block_id, epoch)` of each rBlock concerned.
  """

  time_s: float
  creditor: InstanceId
  owner: InstanceId
  incarnation: int
  name: str
  grants: tuple[tuple[BlockId, Epoch], ...]

  def __str__(self) -> str:
    return (
      f"{self.time_s:.6f} creditor {self.creditor}: {self.name} of owner"
      f" {self.owner}.{self.incarnation} {list(self.grants)}"
    )


@dataclasses.dataclass(slots=True)
class ModelLease:
  """An rBlock that is lent.

  Attributes:
    owner: To whom.
    incarnation: The owner's.
    uid: The owner's request.
    slot: The request's spill slot.
    epoch: Reservation epoch.
    is_hosted: Whether it was committed.
  """

  owner: InstanceId
  incarnation: int
  uid: RequestUid
  slot: SlotName
  epoch: Epoch
  is_hosted: bool = False
