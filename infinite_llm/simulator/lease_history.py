"""A history checker: a creditor's books against a sequential model of leases.

The model knows what leases are and nothing of how managers keep them. It sees
what a creditor heard and what it answered, in the order in which that happened,
executes the same operations one after another, and says where the two differ.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchedEntry,
  FetchReply,
  HostedEntry,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.messages import Envelope, LeaseReply, LeaseRequest
from infinite_llm.simulator.lease_model import ModelLease, Operation
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import BlockId, Epoch, InstanceId

LEASE_REQUESTS = (Reserve, Commit, Release, Sync, Fetch)
LEASE_REPLIES = (
  ReserveReply,
  CommitReply,
  ReleaseReply,
  SyncReply,
  FetchReply,
)

_KEPT_OPERATIONS = 400


@dataclasses.dataclass(slots=True)
class _Executed:
  """A request that was executed once.

  Attributes:
    request: What was asked.
    reply: The first answer.
  """

  request: LeaseRequest
  reply: LeaseReply


class LeaseHistory:
  """What one incarnation of a creditor may have lent, by what was said.

  Attributes:
    leases: All that live, by rBlock.
    operations: The last ones.
  """

  def __init__(
    self,
    creditor: InstanceId,
    incarnation: int,
    *,
    lease_s: float,
    max_lent_blocks: int | None,
    now_s: float,
  ):
    """Makes the history of a creditor that has just begun.

    Args:
      creditor: The creditor.
      incarnation: Its own.
      lease_s: Seconds of silence that end an owner's leases.
      max_lent_blocks: Most rBlocks that it lends; None is no cap.
      now_s: Its clock.
    """
    self.leases: dict[BlockId, ModelLease] = {}
    self.operations: collections.deque[Operation] = collections.deque(
      maxlen=_KEPT_OPERATIONS
    )
    self._creditor = creditor
    self._incarnation = incarnation
    self._lease_s = lease_s
    self._cap = max_lent_blocks
    self._now_s = now_s
    self._ticked_s = now_s
    self._heard_s: dict[InstanceId, float] = {}
    self._incarnation_of: dict[InstanceId, int] = {}
    self._executed: dict[tuple[InstanceId, int, int], _Executed] = {}
    self._num_lent: dict[InstanceId, int] = {}
    self._last_epoch: Epoch = 0

  def on_heard(self, envelope: Envelope, now_s: float) -> None:
    """Notes a message of another instance that the creditor now takes."""
    sender = envelope.sender
    if not isinstance(sender, int):
      return
    self._now_s = now_s
    incarnation = envelope.responder or envelope.incarnation
    known = self._incarnation_of.get(sender, 0)
    if incarnation < known:
      return
    if incarnation > known:
      self._incarnation_of[sender] = incarnation
      self._end_all(sender, "restart")
    self._heard_s[sender] = now_s

  def on_ticked(self, now_s: float) -> None:
    """Notes that the creditor looked which leases have ended."""
    if now_s - self._ticked_s > self._lease_s / 2:  # It slept: all live on.
      self._heard_s = dict.fromkeys(self._heard_s, now_s)
    self._now_s = self._ticked_s = now_s
    if self.leases:  # Else there is nothing that could end.
      for owner, heard_s in tuple(self._heard_s.items()):
        if now_s - heard_s >= self._lease_s:
          del self._heard_s[owner]
          self._end_all(owner, "expire")

  def on_answered(
    self, request: Envelope, answer: Envelope, now_s: float
  ) -> None:
    """Executes a request that the creditor has answered.

    Raises:
      ViolationError: If it should not have been executed, or not answered so.
    """
    body, reply, owner = request.body, answer.body, request.sender
    if (
      not isinstance(body, LEASE_REQUESTS)
      or not isinstance(reply, LEASE_REPLIES)
      or not isinstance(owner, int)
    ):
      return
    self._now_s = now_s
    key = (owner, request.incarnation, request.seq)
    executed = self._executed.get(key)
    if executed is not None:
      if executed.reply != reply:
        raise self._wrong(
          f"answered {executed.request} with {executed.reply}, and its"
          f" repetition with {reply}"
        )
      return
    if request.incarnation < self._incarnation_of.get(owner, 0):
      raise self._wrong(f"executed {body} of a dead incarnation of {owner}")
    if request.meant_for != self._incarnation:
      raise self._wrong(
        f"executed {body} of {owner}, meant for incarnation {request.meant_for}"
      )
    self._executed[key] = _Executed(body, reply)
    self._execute(owner, request.incarnation, body, reply)

  def check_books(self, lent: Mapping[InstanceId, int]) -> None:
    """Compares how much the creditor says that it has lent.

    Raises:
      ViolationError: If that is not what the history says.
    """
    if lent != self._num_lent:
      raise self._wrong(f"says that it lent {dict(lent)}, not {self._num_lent}")

  def lease(
    self, owner: InstanceId, incarnation: int, block_id: BlockId
  ) -> ModelLease | None:
    """The lease under which an owner may read an rBlock; None if none lives."""
    lease = self.leases.get(block_id)
    if (
      lease is None
      or not lease.is_hosted
      or (lease.owner, lease.incarnation) != (owner, incarnation)
    ):
      return None
    return lease

  def _execute(
    self,
    owner: InstanceId,
    incarnation: int,
    request: LeaseRequest,
    reply: LeaseReply,
  ) -> None:
    match request, reply:
      case Reserve(), ReserveReply():
        self._reserve(owner, incarnation, request, reply)
      case Commit(), CommitReply():
        self._commit(owner, incarnation, request, reply)
      case Release(), ReleaseReply():
        ended = [
          grant.block_id
          for grant in request.grants
          if self._is_leased(owner, incarnation, grant.block_id, grant.epoch)
        ]
        self._end(ended, "release")
      case Sync(), SyncReply():
        self._sync(owner, incarnation, request, reply)
      case Fetch(), FetchReply():
        hosted = self._hosted(owner, incarnation, request, request.entries)
        if reply.table_version is not None and not all(hosted):
          raise self._wrong(f"sent what it does not host: {request}")
        self._note(owner, incarnation, "fetch", request.entries)
      case _:
        raise self._wrong(f"answered {request} with {reply}")

  def _reserve(
    self,
    owner: InstanceId,
    incarnation: int,
    request: Reserve,
    reply: ReserveReply,
  ) -> None:
    if len(reply.grants) > request.num_blocks:
      raise self._wrong(f"granted {reply.grants} for {request}")
    for grant in reply.grants:
      if grant.block_id in self.leases:
        raise self._wrong(
          f"granted {grant} to {owner}, which is lent already:"
          f" {self.leases[grant.block_id]}"
        )
      if grant.epoch <= self._last_epoch:
        raise self._wrong(
          f"granted {grant} under an epoch that is not after {self._last_epoch}"
        )
      self._last_epoch = grant.epoch
      self.leases[grant.block_id] = ModelLease(
        owner, incarnation, request.uid, request.slot, grant.epoch
      )
    self._count(owner, len(reply.grants))
    if self._cap is not None and len(self.leases) > self._cap:
      raise self._wrong(f"lent {len(self.leases)} rBlocks; its cap {self._cap}")
    grants = tuple((g.block_id, g.epoch) for g in reply.grants)
    self._record(owner, incarnation, "reserve", grants)

  def _commit(
    self,
    owner: InstanceId,
    incarnation: int,
    request: Commit,
    reply: CommitReply,
  ) -> None:
    leases = self._matching(owner, incarnation, request, request.entries)
    is_known = None not in leases
    if (reply.table_version is not None) and not is_known:
      raise self._wrong(f"hosts what it never reserved: {request}")
    if reply.table_version is None:
      if is_known and not self._is_slot_taken(owner, request.slot):
        raise self._wrong(f"refused to host what it reserved: {request}")
      return
    for lease in leases:
      if lease is not None:
        lease.is_hosted = True
    self._note(owner, incarnation, "commit", request.entries)

  def _sync(
    self,
    owner: InstanceId,
    incarnation: int,
    request: Sync,
    reply: SyncReply,
  ) -> None:
    hosted = self._hosted(owner, incarnation, request, request.entries)
    missing = tuple(
      entry.logical_id
      for entry, is_hosted in zip(request.entries, hosted, strict=True)
      if not is_hosted
    )
    if reply.missing != missing:
      raise self._wrong(
        f"says that it lacks {reply.missing}, not {missing}, of {request}"
      )
    self._note(owner, incarnation, "sync", request.entries)

  def _matching(
    self,
    owner: InstanceId,
    incarnation: int,
    request: Commit | Sync | Fetch,
    entries: Iterable[HostedEntry | FetchedEntry],
  ) -> list[ModelLease | None]:
    """The lease that each entry names; None where it does not live."""
    matching: list[ModelLease | None] = []
    for entry in entries:
      grant = entry.grant
      lease = self.leases.get(grant.block_id)
      is_meant = (
        lease is not None
        and self._is_leased(owner, incarnation, grant.block_id, grant.epoch)
        and (lease.uid, lease.slot) == (request.uid, request.slot)
      )
      matching.append(lease if is_meant else None)
    return matching

  def _hosted(
    self,
    owner: InstanceId,
    incarnation: int,
    request: Sync | Fetch,
    entries: Iterable[HostedEntry | FetchedEntry],
  ) -> list[bool]:
    return [
      lease is not None and lease.is_hosted
      for lease in self._matching(owner, incarnation, request, entries)
    ]

  def _is_leased(
    self, owner: InstanceId, incarnation: int, block_id: BlockId, epoch: Epoch
  ) -> bool:
    lease = self.leases.get(block_id)
    return lease is not None and (owner, incarnation, epoch) == (
      lease.owner,
      lease.incarnation,
      lease.epoch,
    )

  def _is_slot_taken(self, owner: InstanceId, slot: SlotName) -> bool:
    """Whether a slot may still serve its last holder."""
    return any(
      lease.owner == owner
      and lease.slot.slot == slot.slot
      and lease.slot.epoch != slot.epoch
      for lease in self.leases.values()
    )

  def _end_all(self, owner: InstanceId, name: str) -> None:
    self._end(
      [b for b, lease in self.leases.items() if lease.owner == owner], name
    )

  def _end(self, block_ids: list[BlockId], name: str) -> None:
    for block_id in block_ids:
      lease = self.leases.pop(block_id)
      self._count(lease.owner, -1)
      self._record(
        lease.owner, lease.incarnation, name, ((block_id, lease.epoch),)
      )

  def _count(self, owner: InstanceId, change: int) -> None:
    count = self._num_lent.get(owner, 0) + change
    if count:
      self._num_lent[owner] = count
    else:
      self._num_lent.pop(owner, None)

  def _note(
    self,
    owner: InstanceId,
    incarnation: int,
    name: str,
    entries: Iterable[HostedEntry | FetchedEntry],
  ) -> None:
    grants = tuple((e.grant.block_id, e.grant.epoch) for e in entries)
    self._record(owner, incarnation, name, grants)

  def _record(
    self,
    owner: InstanceId,
    incarnation: int,
    name: str,
    grants: tuple[tuple[BlockId, Epoch], ...],
  ) -> None:
    self.operations.append(
      Operation(self._now_s, self._creditor, owner, incarnation, name, grants)
    )

  def _wrong(self, what: str) -> ViolationError:
    return ViolationError(
      f"Creditor {self._creditor}.{self._incarnation} {what}."
    )
