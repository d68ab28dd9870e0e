"""What debtors and creditors say to each other about leases.

`messages.py` says how each kind travels.
"""

from infinite_llm.types import (
  NO_EPOCH,
  NULL_BLOCK_ID,
  BlockId,
  Epoch,
  RequestUid,
  value_type,
)


@value_type
class SlotName:
  """A spill slot of an owner while one request has it.

  Attributes:
    slot: Its number, from 0.
    epoch: Rises each time the owner gives the slot to a request.
  """

  slot: int
  epoch: Epoch


@value_type
class Grant:
  """An rBlock that a creditor keeps for the debtor who asked.

  Attributes:
    block_id: Its place in the creditor's pool.
    epoch: The reservation's epoch; with the creditor it names the lease.
  """

  block_id: BlockId
  epoch: Epoch

  def __post_init__(self):
    if self.block_id == NULL_BLOCK_ID or self.epoch == NO_EPOCH:
      raise ValueError(
        f"A grant must name a real rBlock and epoch; got {self}."
      )


@value_type
class HostedEntry:
  """A line of a hosted table: which rBlock of a request a lease holds.

  Attributes:
    logical_id: Number of the rBlock in its request.
    grant: Where it lies at the creditor.
  """

  logical_id: int
  grant: Grant


@value_type
class Reserve:
  """A debtor asks a creditor to keep rBlocks for it.

  Attributes:
    uid: The request whose rBlocks are to move.
    slot: Spill slot that the request has.
    num_blocks: How many are wanted.
  """

  uid: RequestUid
  slot: SlotName
  num_blocks: int


@value_type
class ReserveReply:
  """What the creditor keeps.

  Attributes:
    grants: As many as wanted or fewer; none is a refusal.
  """

  grants: tuple[Grant, ...]


@value_type
class Commit:
  """The payloads are sent: the creditor is to serve them.

  Attributes:
    uid: The request.
    slot: Its spill slot.
    entries: rBlocks to add to the slot's hosted table.
  """

  uid: RequestUid
  slot: SlotName
  entries: tuple[HostedEntry, ...]


@value_type
class CommitReply:
  """How a commit ended.

  Attributes:
    table_version: Version of the hosted table that has the new entries; None
      if a lease is unknown, in which case nothing was changed.
  """

  table_version: int | None


@value_type
class Release:
  """A debtor gives rBlocks back. Unknown leases are given back already.

  Attributes:
    slot: Spill slot of the request that had them.
    grants: The leases that end.
  """

  slot: SlotName
  grants: tuple[Grant, ...]


@value_type
class ReleaseReply:
  """The leases have ended.

  Attributes:
    table_version: Version of the slot's hosted table without them; None if the
      creditor has no table for the slot.
  """

  table_version: int | None


@value_type
class Sync:
  """A debtor says what the creditor should be hosting for a request.

  Attributes:
    uid: The request.
    slot: Its spill slot.
    entries: All of its rBlocks there.
  """

  uid: RequestUid
  slot: SlotName
  entries: tuple[HostedEntry, ...]


@value_type
class SyncReply:
  """Whether the creditor hosts all that.

  Attributes:
    table_version: Version under which just these entries are installed anew;
      None if some are missing, in which case nothing was changed.
    missing: Logical numbers of the rBlocks that it does not host.
  """

  table_version: int | None
  missing: tuple[int, ...]


@value_type
class FetchedEntry:
  """An rBlock that is to come home.

  Attributes:
    logical_id: Its number in its request.
    grant: Where it lies at the creditor.
    home: Where it is to lie at the owner, and under which epoch.
  """

  logical_id: int
  grant: Grant
  home: Grant


@value_type
class Fetch:
  """A debtor asks its creditor to send rBlocks back. The leases stay.

  Attributes:
    uid: The request.
    slot: Its spill slot.
    entries: What to send, and where to.
  """

  uid: RequestUid
  slot: SlotName
  entries: tuple[FetchedEntry, ...]


@value_type
class FetchReply:
  """How a fetch ended; given once the payloads are exchanged.

  Attributes:
    table_version: Version of the slot's hosted table without the rBlocks that
      were sent, whose leases go on; None if a lease is unknown, in which case
      the table is as it was.
  """

  table_version: int | None


@value_type
class Renew:
  """A debtor lives; so do all its leases at the receiver.

  Attributes:
    sent_s: When this was sent, by the debtor's clock.
  """

  sent_s: float


@value_type
class Renewed:
  """A creditor has heard a renewal.

  Attributes:
    sent_s: That of the renewal.
  """

  sent_s: float


@value_type
class Introduction:
  """A request was not meant for this incarnation, and was not executed.

  The envelope says which incarnation answers, so the sender may ask again.
  """


type LeaseRequest = Reserve | Commit | Release | Sync | Fetch
type LeaseReply = (
  ReserveReply | CommitReply | ReleaseReply | SyncReply | FetchReply
)
