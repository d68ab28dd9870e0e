"""The lending half of an rManager: leases on this instance's rBlocks."""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import Location
from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.effects import (
  Effect,
  GrantEpochs,
  Move,
  MoveBlocks,
  full_block_move,
)
from infinite_llm.scheduler.fault_points import Mishap, Place
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchedEntry,
  FetchReply,
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
from infinite_llm.scheduler.leases import LeaseDeadlines, Owner
from infinite_llm.scheduler.messages import (
  Envelope,
)
from infinite_llm.types import (
  NO_EPOCH,
  BlockId,
  Epoch,
  FaultPoint,
  InstanceId,
  RequestUid,
  value_type,
)


@value_type
class _Lease:
  """An rBlock that this instance keeps for another one's request.

  Attributes:
    owner: Who borrowed it.
    uid: The owner's request.
    slot: The request's spill slot.
    epoch: Reservation epoch.
    is_hosted: Whether its payload was committed.
  """

  owner: Owner
  uid: RequestUid
  slot: SlotName
  epoch: Epoch
  is_hosted: bool = False


@dataclasses.dataclass(kw_only=True, eq=False)
class _Fetching:
  """A fetch whose payloads wait for the exchange.

  Attributes:
    envelope: What to answer.
    owner: Who asked.
    request: What for.
    unsent: Payloads not yet exchanged.
  """

  envelope: Envelope
  owner: Owner
  request: Fetch
  unsent: set[Move]


class Creditor:
  """Grants, serves and takes back what this instance lends.

  It decides from its own books alone, first come first served, and never
  borrows to serve a debtor (`DESIGN.md` section 5, rule 4). A lease is known by
  owner, the owner's incarnation, rBlock and epoch; a message about any other
  changes nothing. Leases end with their owner: when it was silent for a lease
  time, and when a later incarnation of it is heard.

  Attributes:
    hosted: The tables through which the devices answer for the debtors.
    is_frozen: Nothing is lent for now.
    promised: rBlocks that are not lent, for the instance's own running requests
      are still to get them.
  """

  def __init__(
    self,
    pool: BlockPool,
    block_size: int,
    lending: LendingConfig,
    clock: Callable[[], float],
    effects: list[Effect],
    faults: FaultPoint,
  ):
    """Makes a creditor that lends nothing yet.

    Args:
      pool: The instance's rBlocks.
      block_size: P, tokens per rBlock.
      lending: How much of it may be lent, and for how long.
      clock: Monotonic seconds.
      effects: Takes what the data plane is to do.
      faults: What goes wrong.
    """
    self._faults = faults
    self.hosted = HostedTables()
    self.is_frozen = False
    self.promised = 0
    self._pool = pool
    self._block_size = block_size
    self._lending = lending
    self._deadlines = LeaseDeadlines(lending.lease_s, clock)
    self._leases: dict[BlockId, _Lease] = {}
    self._num_lent: collections.Counter[InstanceId] = collections.Counter()
    self._fetching: dict[Move, _Fetching] = {}
    self._effects = effects

  @property
  def lendable(self) -> int:
    """rBlocks that it would grant now."""
    if not self._lending.has_lenders or self.is_frozen:
      return 0
    if self._faults(Place.CAP_IGNORED):
      return self._pool.num_free
    kept = self.promised + (self._lending.headroom_blocks or 0)
    spare = self._pool.num_free - kept
    if self._lending.max_lent_blocks is not None:
      spare = min(spare, self._lending.max_lent_blocks - self._pool.num_lent)
    return max(spare, 0)

  def lent(self) -> dict[InstanceId, int]:
    """rBlocks kept for each debtor, promised ones included."""
    return dict(self._num_lent)

  def hear(self, owner: InstanceId) -> None:
    """Renews all leases of an owner, of whom a message has come."""
    self._deadlines.renew(owner)

  def end_expired(self) -> None:
    """Ends the leases of owners that were silent for too long."""
    for owner in self._deadlines.take_expired():
      if not self._faults(Place.EXPIRY_SKIPPED):
        self.end_leases_of(owner)

  def end_leases_of(self, owner: InstanceId) -> None:
    """Takes back all that an owner holds, and forgets its tables."""
    self._end(
      [b for b, lease in self._leases.items() if lease.owner.instance == owner]
    )
    self.hosted.drop(owner)
    self._fetching = {
      move: fetching
      for move, fetching in self._fetching.items()
      if fetching.envelope.sender != owner
    }

  def fault_in_grants(
    self, owner: InstanceId, grants: Iterable[Grant]
  ) -> str | None:
    """Says why an owner cannot have these leases; None if it may have had."""
    for grant in grants:
      lease = self._leases.get(grant.block_id)
      if lease is None or lease.epoch != grant.epoch:
        if self._pool.is_from_the_future(grant.epoch):
          return f"{grant} was never granted."
      elif lease.owner.instance != owner:
        return f"{grant} is a lease of somebody else."
    return None

  def execute(
    self, sender: InstanceId, envelope: Envelope, request: LeaseRequest
  ) -> LeaseReply | None:
    """Does what a debtor asks; the caller sees to it that this happens once.

    Args:
      sender: Who asks.
      envelope: The request as it came.
      request: Its body.

    Returns:
      The answer; None if `on_exchanged` will give it.
    """
    owner = Owner(instance=sender, incarnation=envelope.incarnation)
    match request:
      case Reserve():
        return self.try_move_kvcache(owner, request)
      case Commit():
        return self._commit(owner, request)
      case Release():
        return self._release(owner, request)
      case Sync():
        return self._sync(owner, request)
      case Fetch():
        return self._fetch(owner, envelope, request)

  def try_move_kvcache(self, owner: Owner, request: Reserve) -> ReserveReply:
    """Keeps rBlocks for a debtor, first come first served.

    The name is the paper's (arXiv 2401.02669v2).

    Args:
      owner: Who asks.
      request: What for.

    Returns:
      As many grants as wanted or fewer; none is a refusal.
    """
    count = min(request.num_blocks, self.lendable)
    if self._faults(Mishap.GRANT_FAILS):
      count //= 2
    if not count:
      self._faults(Place.REFUSAL)
    granted = self._pool.reserve_for(owner.instance, request.uid, count)
    grants = tuple(
      Grant(block_id=location.block_id, epoch=location.epoch)
      for location in granted or ()
    )
    for grant in grants:
      self._leases[grant.block_id] = _Lease(
        owner=owner,
        uid=request.uid,
        slot=request.slot,
        epoch=grant.epoch,
      )
    self._count_lent(owner.instance, len(grants))
    self._set_epochs({grant.block_id: grant.epoch for grant in grants})
    return ReserveReply(grants=grants)

  def on_exchanged(
    self, moves: Iterable[Move]
  ) -> list[tuple[Envelope, FetchReply]]:
    """Notes that payloads were sent; those of ended leases are ignored.

    Returns:
      Fetches all of whose payloads are now sent, with their answers.
    """
    done: list[tuple[Envelope, FetchReply]] = []
    for move in moves:
      fetching = self._fetching.pop(move, None)
      if fetching is None:
        continue
      fetching.unsent.remove(move)
      if not fetching.unsent:
        done.append((fetching.envelope, self._end_fetch(fetching)))
    return done

  def _commit(self, owner: Owner, request: Commit) -> CommitReply:
    leased = [e for e in request.entries if self._has_lease(owner, request, e)]
    is_known = len(leased) == len(request.entries)
    is_known = is_known or self._faults(Place.COMMIT_UNRESERVED)
    if not is_known or self.hosted.is_taken(owner.instance, request.slot):
      return CommitReply(table_version=None)
    for entry in leased:
      lease = self._leases[entry.grant.block_id]
      if not lease.is_hosted:
        self._pool.commit_hosted(entry.grant.block_id, lease.epoch)
        self._leases[entry.grant.block_id] = dataclasses.replace(
          lease, is_hosted=True
        )
    version = self.hosted.add(
      owner.instance, request.slot, _lines(request.entries)
    )
    return CommitReply(table_version=version)

  def _release(self, owner: Owner, request: Release) -> ReleaseReply:
    ended: list[BlockId] = []
    for grant in request.grants:
      lease = self._leases.get(grant.block_id)
      if lease and lease.owner == owner and self._is_of(lease, grant.epoch):
        ended.append(grant.block_id)
    self._end(ended)
    if self._faults(Place.TABLE_KEPT):
      ended = []
    version = self.hosted.remove(owner.instance, request.slot, ended)
    return ReleaseReply(table_version=version)

  def _sync(self, owner: Owner, request: Sync) -> SyncReply:
    missing = tuple(
      entry.logical_id
      for entry in request.entries
      if not self._is_hosted(owner, request, entry)
    )
    if missing:
      return SyncReply(table_version=None, missing=missing)
    version = self.hosted.replace(
      owner.instance, request.slot, _lines(request.entries)
    )
    return SyncReply(table_version=version, missing=())

  def _fetch(
    self, owner: Owner, envelope: Envelope, request: Fetch
  ) -> FetchReply | None:
    if not all(self._is_hosted(owner, request, e) for e in request.entries):
      return FetchReply(table_version=None)
    moves = tuple(
      full_block_move(
        request.uid,
        entry.logical_id,
        _location(self._pool.instance, entry.grant),
        _location(owner.instance, entry.home),
        self._block_size,
      )
      for entry in request.entries
    )
    fetching = _Fetching(
      envelope=envelope, owner=owner, request=request, unsent=set(moves)
    )
    self._fetching.update(dict.fromkeys(moves, fetching))
    self._effects.append(MoveBlocks(moves=moves))
    return None

  def _end_fetch(self, fetching: _Fetching) -> FetchReply:
    """Lets the owner read its copies in place of ours."""
    owner, request = fetching.owner, fetching.request
    if not all(self._is_hosted(owner, request, e) for e in request.entries):
      return FetchReply(table_version=None)  # Given back meanwhile.
    version = self.hosted.retire(
      owner.instance,
      request.slot,
      [entry.grant.block_id for entry in request.entries],
    )
    return FetchReply(table_version=version)

  def _end(self, block_ids: list[BlockId]) -> None:
    """Ends leases: the rBlocks are free, and late payloads are refused."""
    for block_id in block_ids:
      lease = self._leases.pop(block_id)
      self._pool.release_hosted(block_id, lease.epoch)
      self._count_lent(lease.owner.instance, -1)
    if not self._faults(Place.EPOCHS_KEPT):
      self._set_epochs(dict.fromkeys(block_ids, NO_EPOCH))

  def _is_hosted(
    self,
    owner: Owner,
    request: Sync | Fetch,
    entry: HostedEntry | FetchedEntry,
  ) -> bool:
    return (
      self._has_lease(owner, request, entry)
      and self._leases[entry.grant.block_id].is_hosted
    )

  def _has_lease(
    self,
    owner: Owner,
    request: Commit | Sync | Fetch,
    entry: HostedEntry | FetchedEntry,
  ) -> bool:
    lease = self._leases.get(entry.grant.block_id)
    named = (owner, request.uid, request.slot)
    return (
      lease is not None
      and named == (lease.owner, lease.uid, lease.slot)
      and self._is_of(lease, entry.grant.epoch)
    )

  def _is_of(self, lease: _Lease, epoch: Epoch) -> bool:
    """Whether a lease is the one that a debtor means."""
    return lease.epoch == epoch or self._faults(Place.EPOCH_UNCHECKED)

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


def _location(instance: InstanceId, grant: Grant) -> Location:
  return Location(instance=instance, block_id=grant.block_id, epoch=grant.epoch)
