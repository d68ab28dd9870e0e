"""The lending half of an rManager: leases on this instance's rBlocks."""

import collections
import dataclasses

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.effects import Effect, GrantEpochs
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.messages import (
  Commit,
  CommitReply,
  Grant,
  HostedEntry,
  LeaseReply,
  LeaseRequest,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.types import NO_EPOCH, BlockId, Epoch, InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lease:
  """An rBlock that this instance keeps for another one's request.

  Attributes:
    owner: The instance that borrowed it.
    uid: Its request.
    slot: The request's spill slot.
    epoch: Reservation epoch.
    is_hosted: Whether its payload was committed.
  """

  owner: InstanceId
  uid: RequestUid
  slot: SlotName
  epoch: Epoch
  is_hosted: bool = False


class Creditor:
  """Grants, serves and takes back what this instance lends.

  It decides from its own books alone, first come first served, and never
  borrows to serve a debtor (`DESIGN.md` section 5, rule 4). A lease is known by
  owner, rBlock and epoch; a message about any other changes nothing.

  Attributes:
    hosted: The tables through which the devices answer for the debtors.
  """

  def __init__(self, pool: BlockPool, lending: LendingConfig):
    """Makes a creditor that lends nothing yet.

    Args:
      pool: The instance's rBlocks.
      lending: How much of it may be lent.
    """
    self.hosted = HostedTables()
    self._pool = pool
    self._lending = lending
    self._leases: dict[BlockId, _Lease] = {}
    self._num_lent: collections.Counter[InstanceId] = collections.Counter()
    self._effects: list[Effect] = []

  @property
  def lendable(self) -> int:
    """rBlocks that it would grant now."""
    if self._lending.policy == "static":
      return 0
    spare = self._pool.num_free - (self._lending.headroom_blocks or 0)
    if self._lending.max_lent_blocks is not None:
      spare = min(spare, self._lending.max_lent_blocks - self._pool.num_lent)
    return max(spare, 0)

  def lent(self) -> dict[InstanceId, int]:
    """rBlocks kept for each debtor, promised ones included."""
    return dict(self._num_lent)

  def execute(self, owner: InstanceId, request: LeaseRequest) -> LeaseReply:
    """Does what a debtor asks; the caller sees to it that this happens once.

    Args:
      owner: Who asks.
      request: What for.

    Returns:
      The answer.
    """
    match request:
      case Reserve():
        return self._reserve(owner, request)
      case Commit():
        return self._commit(owner, request)
      case Release():
        return self._release(owner, request)
      case Sync():
        return self._sync(owner, request)

  def drain_effects(self) -> list[Effect]:
    """Takes what the data plane is to do now, in order."""
    effects, self._effects = self._effects, []
    return effects

  def _reserve(self, owner: InstanceId, request: Reserve) -> ReserveReply:
    count = min(request.num_blocks, self.lendable)
    granted = self._pool.reserve_for(owner, request.uid, count)
    grants = tuple(
      Grant(block_id=location.block_id, epoch=location.epoch)
      for location in granted or ()
    )
    for grant in grants:
      self._leases[grant.block_id] = _Lease(
        owner=owner, uid=request.uid, slot=request.slot, epoch=grant.epoch
      )
    self._count_lent(owner, len(grants))
    self._set_epochs({grant.block_id: grant.epoch for grant in grants})
    return ReserveReply(grants=grants)

  def _commit(self, owner: InstanceId, request: Commit) -> CommitReply:
    is_known = all(
      self._has_lease(owner, request, entry) for entry in request.entries
    )
    if not is_known or self.hosted.is_taken(owner, request.slot):
      return CommitReply(table_version=None)
    for entry in request.entries:
      lease = self._leases[entry.grant.block_id]
      if not lease.is_hosted:
        self._pool.commit_hosted(entry.grant.block_id, lease.epoch)
        self._leases[entry.grant.block_id] = dataclasses.replace(
          lease, is_hosted=True
        )
    version = self.hosted.add(owner, request.slot, _lines(request.entries))
    return CommitReply(table_version=version)

  def _release(self, owner: InstanceId, request: Release) -> ReleaseReply:
    ended: list[BlockId] = []
    for grant in request.grants:
      lease = self._leases.get(grant.block_id)
      if lease and (lease.owner, lease.epoch) == (owner, grant.epoch):
        self._pool.release_hosted(grant.block_id, grant.epoch)
        del self._leases[grant.block_id]
        ended.append(grant.block_id)
    self._count_lent(owner, -len(ended))
    self._set_epochs(dict.fromkeys(ended, NO_EPOCH))
    version = self.hosted.remove(owner, request.slot, ended)
    return ReleaseReply(table_version=version)

  def _sync(self, owner: InstanceId, request: Sync) -> SyncReply:
    missing = tuple(
      entry.logical_id
      for entry in request.entries
      if not self._has_lease(owner, request, entry)
      or not self._leases[entry.grant.block_id].is_hosted
    )
    if missing:
      return SyncReply(table_version=None, missing=missing)
    version = self.hosted.replace(owner, request.slot, _lines(request.entries))
    return SyncReply(table_version=version, missing=())

  def _has_lease(
    self, owner: InstanceId, request: Commit | Sync, entry: HostedEntry
  ) -> bool:
    lease = self._leases.get(entry.grant.block_id)
    named = (owner, request.uid, request.slot, entry.grant.epoch)
    return lease is not None and named == (
      lease.owner,
      lease.uid,
      lease.slot,
      lease.epoch,
    )

  def _count_lent(self, owner: InstanceId, change: int) -> None:
    self._num_lent[owner] += change
    if not self._num_lent[owner]:
      del self._num_lent[owner]

  def _set_epochs(self, epochs: dict[BlockId, Epoch]) -> None:
    if epochs:
      self._effects.append(
        GrantEpochs(block_ids=tuple(epochs), epochs=tuple(epochs.values()))
      )


def _lines(
  entries: tuple[HostedEntry, ...],
) -> list[tuple[BlockId, int]]:
  return [(entry.grant.block_id, entry.logical_id) for entry in entries]
