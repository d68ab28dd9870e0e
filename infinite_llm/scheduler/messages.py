"""What managers say to each other.

A *request* (`Reserve`, `Commit`, `Release`, `Sync`, `Fetch`,
`CandidatesRequest`) is sent again until its answer arrives; its receiver
executes it once and answers repetitions with the same answer. All others are
sent once. A heartbeat says what changed since the last one; if that was lost,
the gManager asks for all.
"""

from collections.abc import Mapping
from typing import Final, Literal

from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchReply,
  Introduction,
  LeaseReply,
  LeaseRequest,
  Release,
  ReleaseReply,
  Renew,
  Renewed,
  Reserve,
  ReserveReply,
  Sync,
  SyncReply,
)
from infinite_llm.types import (
  NO_EPOCH,
  Epoch,
  InstanceId,
  PoolCounts,
  RequestUid,
  value_type,
)

GMANAGER: Final = "gmanager"
"""Address of the gManager; an rManager's is the number of its instance."""

STANDBY: Final = "standby"
"""Address of a second gManager, which takes over when the first one falls."""

type GManagerAddress = Literal["gmanager", "standby"]

GMANAGERS: Final[tuple[GManagerAddress, ...]] = (GMANAGER, STANDBY)
"""Addresses of all gManagers that there may be."""

type Address = InstanceId | GManagerAddress

type BlocksOf = tuple[tuple[InstanceId, int], ...]
"""`(instance, number of rBlocks)`, by rising instance."""


@value_type
class RequestBlocks:
  """Where the rBlocks of one running request are.

  Attributes:
    uid: The request.
    holders: rBlocks with each holder, its owner included, promised ones too; no
      holder at all says that the request has ended.
    movable: rBlocks at home that could move to another instance now.
  """

  uid: RequestUid
  holders: BlocksOf
  movable: int = 0


@value_type
class Heartbeat:
  """An rManager's report to the gManager.

  Attributes:
    base: Number of the heartbeat that this one is a change of; None if it says
      everything.
    counts: Use of its rBlocks.
    lendable: rBlocks that it would lend now.
    num_running: Requests that run.
    num_waiting: Requests that wait.
    next_blocks: rBlocks that the first of those needs; 0 if none waits.
    next_arrival: When that one came, by its arrival number; 0 if none waits.
    promised: rBlocks that running requests are still to get for tokens that
      they have.
    local_blocks: rBlocks of running requests that have none elsewhere and need
      none there: they become free as those end.
    lent: What it holds for each debtor, promised ones included. Of a change:
      where that is different now, 0 where there is nothing left.
    requests: Running requests with rBlocks; of a change, those that differ.
    leader_epoch: Newest epoch of a leading gManager that it has heard of.
  """

  base: int | None = None
  counts: PoolCounts
  lendable: int
  num_running: int = 0
  num_waiting: int = 0
  next_blocks: int = 0
  next_arrival: int = 0
  promised: int = 0
  local_blocks: int = 0
  lent: BlocksOf = ()
  requests: tuple[RequestBlocks, ...] = ()
  leader_epoch: Epoch = NO_EPOCH

  @property
  def is_change(self) -> bool:
    """Whether it says only what changed."""
    return self.base is not None

  def since(
    self, base: int, lent: BlocksOf, requests: tuple[RequestBlocks, ...]
  ) -> "Heartbeat":
    """The same as a change.

    Args:
      base: Number of the heartbeat before.
      lent: What it holds for debtors, where that is different now.
      requests: Requests that differ.
    """
    # `dataclasses.replace` takes ten times as long, for each heartbeat.
    return Heartbeat(
      base=base,
      counts=self.counts,
      lendable=self.lendable,
      num_running=self.num_running,
      num_waiting=self.num_waiting,
      next_blocks=self.next_blocks,
      next_arrival=self.next_arrival,
      promised=self.promised,
      local_blocks=self.local_blocks,
      lent=lent,
      requests=requests,
      leader_epoch=self.leader_epoch,
    )


@value_type
class FullHeartbeatRequest:
  """The gManager missed a heartbeat and asks for everything."""


@value_type
class ClusterStatus:
  """The leading gManager's view, sent back for a heartbeat.

  Attributes:
    lendable: rBlocks that all other instances together would lend, as of their
      last heartbeats.
    allotted_to: Arrival number of the receiver's request that may come in on
      the strength of those (`allotment.py`); 0 if none may.
  """

  lendable: int
  allotted_to: int = 0


@value_type
class Leadership:
  """The leading gManager tells the other one that it lives."""


@value_type
class MoveKvcache:
  """A plan of the gManager: an owner is to move rBlocks to a creditor.

  An owner that cannot, or whose creditor refuses, waits for the next plan.

  Attributes:
    uid: The owner's request.
    num_blocks: How many of its rBlocks, oldest first.
    dst: The creditor.
    with_request: Whether the request itself moves too, and runs there then.
  """

  uid: RequestUid
  num_blocks: int
  dst: InstanceId
  with_request: bool = False


@value_type
class RecallKvcache:
  """A plan of the gManager: an owner is to take rBlocks home.

  The owner is on a circle of debts. All on it are to get room from what the
  others take home, so meanwhile nobody on it lends or borrows.

  Attributes:
    uid: The owner's request.
    num_blocks: How many of its rBlocks.
    src: The creditor that holds them.
    freeze_s: Seconds for which the owner lends and borrows nothing.
  """

  uid: RequestUid
  num_blocks: int
  src: InstanceId
  freeze_s: float


@value_type
class CandidatesRequest:
  """A debtor asks the gManager who might lend.

  Attributes:
    num_blocks: How many rBlocks it wants to move away.
  """

  num_blocks: int


@value_type
class Candidates:
  """Whom to ask, in this order, and for how much.

  Attributes:
    rooms: Creditors and how many rBlocks to ask each for at most; at most
      three, and none if nobody has room.
  """

  rooms: BlocksOf


type Request = LeaseRequest | CandidatesRequest
type Reply = LeaseReply | Candidates
type Plan = MoveKvcache | RecallKvcache
type Body = (
  Request
  | Reply
  | Renew
  | Renewed
  | Introduction
  | Heartbeat
  | FullHeartbeatRequest
  | ClusterStatus
  | Leadership
  | Plan
)

ANSWER_TO: Final[Mapping[type[Request], type[Reply]]] = {
  CandidatesRequest: Candidates,
  Reserve: ReserveReply,
  Commit: CommitReply,
  Release: ReleaseReply,
  Sync: SyncReply,
  Fetch: FetchReply,
}
"""Which kind of answer each kind of request gets."""


@value_type
class Envelope:
  """A message on its way.

  Attributes:
    sender: Who sends it.
    receiver: Who is to get it.
    incarnation: Rises each time the sender starts anew. An answer carries the
      incarnation and number of the request that it answers.
    seq: Number of the message, rising with each new one of the sender.
    body: What it says.
    settled: The sender needs no answer any more from this receiver to requests
      with smaller numbers; 0 in answers.
    meant_for: The receiver's incarnation that a debtor's message is for; 0 if
      the sender has not heard of any, and in other messages.
    responder: In a creditor's answer, its own incarnation; else 0.
    leader_epoch: In a message of a leading gManager, the epoch of its
      leadership; else 0.
    turn: Between processes of a lending group: number of the first turn of
      group programs that the sender had not taken when it wrote this. What it
      says of rBlocks holds on its devices from that turn on.
  """

  sender: Address
  receiver: Address
  incarnation: int
  seq: int
  body: Body
  settled: int = 0
  meant_for: int = 0
  responder: int = 0
  leader_epoch: Epoch = NO_EPOCH
  turn: int = 0
