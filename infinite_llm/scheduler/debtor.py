"""The borrowing half of an rManager: where its own requests' rBlocks lie.

The owner alone switches: books change when a creditor acknowledged, and the old
copy goes only when the new one was proved (`DESIGN.md` section 5, rule 2).
"""

from collections.abc import Callable, Collection, Iterable

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.config import LendingConfig
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Account, Phase, Reconcile, SpillInfo
from infinite_llm.scheduler.effects import Effect, Move
from infinite_llm.scheduler.fault_points import Mishap, Place
from infinite_llm.scheduler.lease_messages import Grant, Renew, Reserve
from infinite_llm.scheduler.leases import LeaseTrust
from infinite_llm.scheduler.mailbox import Outbox, Pending
from infinite_llm.scheduler.messages import Candidates, Reply, RequestBlocks
from infinite_llm.scheduler.spill_slots import SpillSlotPool
from infinite_llm.scheduler.transfers import Transfers
from infinite_llm.types import FaultPoint, InstanceId, RequestUid

_MAX_REFUTED = 2
"""Moves in a row that are not proved before a request's KV is given up."""


class Debtor:
  """Keeps the accounts of this instance's requests.

  Attributes:
    is_frozen: Requests get no rBlocks for now, neither here nor elsewhere.
  """

  def __init__(
    self,
    pool: BlockPool,
    block_size: int,
    lending: LendingConfig,
    clock: Callable[[], float],
    outbox: Outbox[Account],
    effects: list[Effect],
    faults: FaultPoint,
  ):
    """Makes a debtor without requests.

    Args:
      pool: The instance's rBlocks.
      block_size: P, tokens per rBlock.
      lending: How many requests may have rBlocks elsewhere, and how long
        leases live.
      clock: Monotonic seconds.
      outbox: Takes its messages.
      effects: Takes what the data plane is to do.
      faults: What goes wrong.
    """
    self._faults = faults
    self.is_frozen = False
    self._pool = pool
    self._block_size = block_size
    self._clock = clock
    self._outbox = outbox
    self._slots = SpillSlotPool(lending.spill_slots)
    self._trust = LeaseTrust(lending.lease_s, clock)
    self._transfers = Transfers(pool, outbox, effects, faults)
    self._accounts: dict[RequestUid, Account] = {}
    self._closed: list[Account] = []

  @property
  def num_free_slots(self) -> int:
    """Spill slots that no request has."""
    return self._slots.num_free

  def has_any(self, creditor: InstanceId, grants: Iterable[Grant]) -> bool:
    """Whether any of these leases at a creditor is held already."""
    accounts = (*self._accounts.values(), *self._closed)
    held = [account.leases.get(creditor, {}) for account in accounts]
    return any(h.get(g.block_id) == g.epoch for g in grants for h in held)

  def is_open(self, uid: RequestUid) -> bool:
    """Whether a request is open."""
    return uid in self._accounts

  def is_recalling(self, uid: RequestUid) -> bool:
    """Whether rBlocks of an open request are coming home."""
    return uid in self._accounts and self._accounts[uid].recall is not None

  @property
  def num_open(self) -> int:
    """Open requests."""
    return len(self._accounts)

  def open(self, uid: RequestUid) -> BlockTable:
    """Starts the account of a request."""
    if uid in self._accounts:
      raise InvariantError(
        f"Request {uid} is already open on instance {self._pool.instance}."
      )
    table = BlockTable(uid, self._pool.instance, self._block_size)
    self._accounts[uid] = Account(table=table)
    return table

  def account(self, uid: RequestUid) -> Account:
    """Account of an open request, to look at."""
    if uid not in self._accounts:
      raise InvariantError(
        f"Request {uid} is not open on instance {self._pool.instance}."
      )
    return self._accounts[uid]

  def allocate(self, uid: RequestUid, num_blocks: int) -> bool:
    """Adds local rBlocks to a request, all or none."""
    account = self.account(uid)
    if self.is_frozen or self._faults(Mishap.ALLOCATION_FAILS):
      return False
    locations = self._pool.allocate(num_blocks, uid)
    if locations is None:
      return False
    account.table.append(locations)
    return True

  def confirm(self, uid: RequestUid, num_tokens: int) -> None:
    """Notes that a request's first tokens are computed and proved."""
    account = self.account(uid)
    num_blocks = -(-num_tokens // self._block_size)
    for logical_id in range(account.num_live, num_blocks):
      self._pool.mark_live(account.table.location(logical_id).block_id)
    account.num_live = max(account.num_live, num_blocks)
    account.num_proved_tokens = num_tokens
    account.has_synced = False
    account.num_refuted = 0

  def close(self, uid: RequestUid, kept: Collection[int] = ()) -> None:
    """Ends the account of a request, in whatever phase it is.

    Its local rBlocks are free at once: a payload still to be sent from there
    carries the tag of the old content, and arrives unproved if that is gone.
    Leases end when the creditors say so; until then the spill slot is taken.

    Args:
      uid: An open request.
      kept: Logical numbers of rBlocks at home that somebody else frees, because
        they are being copied to another tier or from there.
    """
    account = self.account(uid)
    del self._accounts[uid]
    account.is_closed = True
    for n, location in account.table.hosted_entries(self._pool.instance):
      if n not in kept:
        self._pool.free(location.block_id, uid)
    self._transfers.abandon(account)
    # Only its answer tells whether a reservation left something to give back.
    self._outbox.give_up(
      lambda pending: (
        pending.context is account and not isinstance(pending.body, Reserve)
      )
    )
    self._closed.append(account)
    if self._faults(Place.RELEASE_FORGOTTEN):
      account.leases.clear()
    for creditor in tuple(account.leases):
      self._transfers.give_back(account, creditor, account.grants_of(creditor))
    self._settle(account)

  def spill(self, uid: RequestUid) -> SpillInfo | None:
    """How to name a request in a group program; None if it is all at home."""
    account = self.account(uid)
    if account.slot is None:
      return None
    creditors = account.table.creditors()
    if not creditors:
      return None
    slot = account.current_slot()
    return SpillInfo(
      slot=slot.slot,
      slot_epoch=slot.epoch,
      versions={creditor: account.versions[creditor] for creditor in creditors},
    )

  def is_readable(self, uid: RequestUid) -> bool:
    """Whether all that a step over a request reads is surely there."""
    account = self.account(uid)
    if account.slot is None:  # Nearly always, and all of it is at home.
      return account.is_settled()
    return account.is_settled() and all(
      self._trust.holds(creditor) or self._faults(Place.TRUST_UNLIMITED)
      for creditor in account.table.creditors()
    )

  def reconcile(self, uid: RequestUid) -> Reconcile:
    """Reacts to a step of a request that could not be proved."""
    account = self.account(uid)
    if account.is_lost:
      return Reconcile.RECOMPUTE
    if not self.is_readable(uid):
      return Reconcile.RETRY
    if account.phase is Phase.SWITCHED:
      self._transfers.roll_back(account)
      self._settle(account)
      return Reconcile.RETRY
    if account.has_synced or not account.table.creditors():
      return Reconcile.RECOMPUTE
    account.has_synced = True
    account.must_sync = True
    self._settle(account)
    return Reconcile.RETRY

  def movable_blocks(self, uid: RequestUid) -> int:
    """How many rBlocks of a request a borrow could move now."""
    account = self.account(uid)
    is_idle = account.phase is Phase.IDLE and not account.is_lost
    has_slot = account.slot is not None or self._slots.num_free > 0
    return account.num_movable() if is_idle and has_slot else 0

  def lost(self) -> tuple[RequestUid, ...]:
    """Open requests with rBlocks that are gone."""
    return tuple(uid for uid, a in self._accounts.items() if a.is_lost)

  @property
  def num_borrows(self) -> int:
    """Borrows that were ever begun, planned ones included."""
    return self._transfers.borrowing.num_begun

  def is_borrowing(self) -> bool:
    """Whether a borrow of any open request is under way."""
    return any(account.borrow for account in self._accounts.values())

  def borrow(self, uid: RequestUid, num_blocks: int) -> bool:
    """Starts to move a request's oldest rBlocks to creditors."""
    account = self.account(uid)
    wanted = min(num_blocks, self.movable_blocks(uid))
    if wanted <= 0 or self.is_frozen or not self._transfers.borrowing.has_room:
      return False
    account.slot = account.slot or self._slots.take()
    self._transfers.borrowing.begin(account, wanted)
    return True

  def move_kvcache(
    self, uid: RequestUid, num_blocks: int, dst: InstanceId
  ) -> bool:
    """Starts to move a request's oldest rBlocks to one creditor."""
    account = self.account(uid)
    wanted = min(num_blocks, self.movable_blocks(uid))
    if wanted <= 0 or self.is_frozen:
      return False
    account.slot = account.slot or self._slots.take()
    self._transfers.borrowing.begin_planned(account, wanted, dst)
    return True

  def recall_kvcache(
    self, uid: RequestUid, num_blocks: int, src: InstanceId
  ) -> bool:
    """Starts to move a request's newest rBlocks at a creditor home."""
    account = self.account(uid)
    is_idle = account.phase is Phase.IDLE and self.is_readable(uid)
    if not is_idle or account.overflows:  # That lent them to have no more here.
      return False
    num_there = len(account.table.hosted_entries(src))
    wanted = min(num_blocks, num_there, self._pool.num_free)
    if wanted > 0:
      self._transfers.recalling.begin(account, src, wanted)
    return wanted > 0

  def on_status(self, has_room: bool) -> None:
    """Notes whether any other instance would lend."""
    self._transfers.borrowing.has_room = has_room

  def on_exchanged(self, moves: Iterable[Move]) -> None:
    """Notes that payloads were sent; those of closed requests are ignored."""
    for move in moves:
      account = self._accounts.get(move.uid)
      if account:
        self._transfers.borrowing.on_exchanged(account, move)

  def rest(self, uid: RequestUid) -> None:
    """Notes that what was under way with an open request is over."""
    self.account(uid).phase = Phase.IDLE
    self._settle(self.account(uid))

  def unverified(self) -> tuple[RequestUid, ...]:
    """Requests with moved rBlocks whose new copies are not proved yet."""
    return tuple(
      uid for uid, a in self._accounts.items() if a.phase is Phase.SWITCHED
    )

  def on_verified(self, uid: RequestUid, is_proved: bool) -> None:
    """Frees the old copies of moved rBlocks, or returns to them."""
    account = self._accounts.get(uid)
    if account is None or account.phase is not Phase.SWITCHED:
      return
    if is_proved or self._faults(Place.PROOF_SKIPPED):
      account.num_refuted = 0
      self._transfers.on_proved(account)
    else:
      account.num_refuted += 1
      # The old copies themselves, or rBlocks that did not move, may be what
      # cannot be proved, and no step will tell while the request lacks room.
      account.is_lost |= account.num_refuted >= _MAX_REFUTED
      self._transfers.roll_back(account)
    self._settle(account)

  def borrowed(self) -> dict[InstanceId, int]:
    """rBlocks held at each creditor, also those being given back."""
    total: dict[InstanceId, int] = {}
    for account in (*self._accounts.values(), *self._closed):
      for creditor, held in account.leases.items():
        total[creditor] = total.get(creditor, 0) + len(held)
    return total

  def requests(self) -> tuple[RequestBlocks, ...]:
    """Where the rBlocks of open requests are, of those that have any."""
    found: list[RequestBlocks] = []
    home = self._pool.instance
    for uid, account in self._accounts.items():
      num_local = account.table.num_at(home)
      if account.leases:
        holders = {c: len(held) for c, held in account.leases.items() if held}
        if num_local:
          holders[home] = num_local
        holders = tuple(sorted(holders.items()))
      else:  # Nearly always.
        holders = ((home, num_local),) if num_local else ()
      if holders:
        movable = self.movable_blocks(uid)
        found.append(RequestBlocks(uid=uid, holders=holders, movable=movable))
    return tuple(found)

  def on_reply(self, pending: Pending[Account], reply: Reply) -> None:
    """Goes on with the account that awaited an answer.

    Args:
      pending: What was asked, and of whom.
      reply: The answer.
    """
    account = pending.context
    if isinstance(reply, Candidates):
      self._transfers.borrowing.on_candidates(account, reply)
    elif isinstance(pending.receiver, int):
      creditor = pending.receiver
      self.on_acknowledged(creditor, pending.first_s)
      self._transfers.on_reply(creditor, pending, reply)
      if not self._trust.is_recent(pending.first_s):
        # The leases that it speaks of may have ended since.
        account.must_sync |= creditor in account.table.creditors()
    self._settle(account)

  def on_acknowledged(self, creditor: InstanceId, sent_s: float) -> None:
    """Notes that a creditor heard a message that was first sent at `sent_s`."""
    self.tick()
    self._trust.acknowledge(creditor, sent_s)

  def on_restarted(self, creditor: InstanceId) -> None:
    """Gives up what lay at a creditor that began anew."""
    self._trust.forget(creditor)
    # A reservation is asked of the new incarnation; all else named old leases.
    self._outbox.give_up(
      lambda pending: (
        pending.receiver == creditor and not isinstance(pending.body, Reserve)
      )
    )
    for account in (*self._accounts.values(), *self._closed):
      account.leases.pop(creditor, None)
      if not account.is_closed:
        self._transfers.on_restarted(account, creditor)
        account.is_lost |= creditor in account.table.creditors()
      self._settle(account)

  def renew(self) -> None:
    """Tells all creditors that this owner lives."""
    for creditor in sorted(self.borrowed()):
      self._outbox.tell(creditor, Renew(sent_s=self._clock()))

  def tick(self) -> None:
    """Stops to trust leases whose creditors did not answer for too long."""
    for creditor in self._trust.take_lapsed():
      if self._faults(Place.TRUST_UNLIMITED):
        continue
      for account in self._accounts.values():
        is_read = creditor in account.table.creditors()
        if is_read and creditor not in account.unsynced:
          account.must_sync = True
          self._settle(account)

  def _settle(self, account: Account) -> None:
    """Does what is due once nothing else is under way with an account."""
    if account.is_closed:
      if not account.leases and not self._outbox.awaits(account):
        self._closed.remove(account)
        self._give_slot_back(account)
    elif account.phase is Phase.IDLE:
      if account.must_sync and not account.is_lost:
        self._transfers.syncing.begin(account)
      if not (account.leases or account.table.creditors()):
        self._give_slot_back(account)

  def _give_slot_back(self, account: Account) -> None:
    if account.slot is not None:
      self._slots.give_back(account.slot)
      account.slot = None
      account.versions.clear()
