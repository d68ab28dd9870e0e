"""How rBlocks of one request move to creditors, step by step.

Ask the gManager for candidates, reserve at each in turn, have the payloads
exchanged, commit, switch the table, wait for the proof, free the old copies.
Every step waits for the acknowledgement of the last; `Phase` says for which.
"""

from infinite_llm.cache.rblock import Location
from infinite_llm.scheduler.account import Account, Borrow, PendingMove, Phase
from infinite_llm.scheduler.effects import (
  Move,
  MoveBlocks,
  full_block_move,
)
from infinite_llm.scheduler.fault_points import Place
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Grant,
  HostedEntry,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Candidates,
  CandidatesRequest,
)
from infinite_llm.scheduler.mover import Mover, grant_of
from infinite_llm.types import InstanceId


class Borrowing(Mover):
  """Moves rBlocks of accounts to creditors, one borrow per account at a time.

  When a borrow has ended, its account is in `Phase.IDLE` without a `borrow`.

  Attributes:
    has_room: Whether others are thought to have room: the cluster's status says
      so, and no borrow that got nothing from anybody has shown otherwise since.
    num_begun: Borrows that were begun.
  """

  has_room = False
  num_begun = 0

  def begin(self, account: Account, num_blocks: int) -> None:
    """Starts a borrow for an idle account that has a spill slot."""
    self.num_begun += 1
    account.borrow = Borrow(wanted=num_blocks)
    account.phase = Phase.ASKING
    request = CandidatesRequest(num_blocks=num_blocks)
    self._outbox.ask(GMANAGER, request, account)

  def begin_planned(
    self, account: Account, num_blocks: int, creditor: InstanceId
  ) -> None:
    """As `begin`, but to one creditor that was named."""
    self.num_begun += 1
    account.borrow = Borrow(
      wanted=num_blocks, candidates=[(creditor, num_blocks)], is_planned=True
    )
    self._try_next(account)

  def on_candidates(self, account: Account, reply: Candidates) -> None:
    """Asks the first candidate for rBlocks."""
    account.current_borrow().candidates = list(reply.rooms)
    self._try_next(account)

  def on_reserved(
    self, account: Account, creditor: InstanceId, reply: ReserveReply
  ) -> None:
    """Sends the oldest rBlocks to the granted places, or asks the next."""
    account.add_leases(creditor, reply.grants)
    if not reply.grants:
      self._try_next(account)
      return
    borrow = account.current_borrow()
    borrow.moves = [
      self._begin_move(account, logical_id, creditor, grant)
      for logical_id, grant in zip(
        account.movable(len(reply.grants)), reply.grants, strict=False
      )
    ]
    borrow.unsent = {pending.move for pending in borrow.moves}
    account.phase = Phase.MOVING
    self._effects.append(
      MoveBlocks(moves=tuple(pending.move for pending in borrow.moves))
    )

  def on_exchanged(self, account: Account, move: Move) -> None:
    """Commits once all payloads are sent; a move of the past is ignored."""
    borrow = account.borrow
    if borrow is None or move not in borrow.unsent:
      return
    borrow.unsent.remove(move)
    if borrow.unsent:
      return
    if self._faults(Place.COMMIT_SKIPPED):
      creditor = move.dst_instance
      version = account.versions.get(creditor, 0)
      self.on_committed(account, creditor, CommitReply(table_version=version))
      return
    account.phase = Phase.COMMITTING
    commit = Commit(
      uid=account.table.uid,
      slot=account.current_slot(),
      entries=tuple(
        HostedEntry(
          logical_id=pending.move.logical_id, grant=grant_of(pending.new)
        )
        for pending in borrow.moves
      ),
    )
    self._outbox.ask(move.dst_instance, commit, account)

  def on_committed(
    self, account: Account, creditor: InstanceId, reply: CommitReply
  ) -> None:
    """Switches to the new copies; the old ones stay until those are proved."""
    if reply.table_version is None:
      self._return_copies(account)
      return
    account.versions[creditor] = reply.table_version
    for pending in account.current_borrow().moves:
      account.table.switch(pending.move.logical_id, pending.new)
    account.phase = Phase.SWITCHED

  def on_proved(self, account: Account) -> None:
    """Frees the old copies and asks the next candidate for the rest."""
    borrow = account.current_borrow()
    for pending in borrow.moves:
      self._pool.free(pending.old.block_id, account.table.uid)
    borrow.num_moved += len(borrow.moves)
    borrow.wanted -= len(borrow.moves)
    borrow.moves = []
    self._try_next(account)

  def roll_back(self, account: Account) -> None:
    """Returns to the old copies, because the new ones were not proved."""
    for pending in account.current_borrow().moves:
      account.table.switch(pending.move.logical_id, pending.old)
    self._return_copies(account)

  def on_returned(
    self, account: Account, creditor: InstanceId, reply: ReleaseReply
  ) -> None:
    """Goes on without the returned copies."""
    if reply.table_version is not None:
      account.versions[creditor] = reply.table_version
    self._try_next(account)

  def abandon(self, account: Account) -> None:
    """Lets go of what the table of an account to be closed does not name."""
    is_switched = account.phase is Phase.SWITCHED
    if is_switched or self._faults(Place.FREED_TWICE):
      for pending in account.current_borrow().moves:
        self._pool.free(pending.old.block_id, account.table.uid)

  def on_restarted(self, account: Account, creditor: InstanceId) -> None:
    """Ends a borrow from a creditor that lost everything."""
    borrow = account.current_borrow()
    is_reserving = account.phase in (Phase.ASKING, Phase.RESERVING)
    if borrow.creditor != creditor or is_reserving:
      return
    for pending in borrow.moves:
      self._pool.cancel_move(pending.old.block_id)
      if account.phase is Phase.SWITCHED:
        account.table.switch(pending.move.logical_id, pending.old)
    self._end(account)

  def _try_next(self, account: Account) -> None:
    borrow = account.current_borrow()
    wanted = min(borrow.wanted, account.num_movable())
    is_over = wanted == 0 or account.must_sync or account.is_lost
    if is_over or not borrow.candidates:
      if not (is_over or borrow.num_moved or borrow.is_planned):
        self.has_room = False
      self._end(account)
      return
    borrow.creditor, most = borrow.candidates.pop(0)
    account.phase = Phase.RESERVING
    request = Reserve(
      uid=account.table.uid,
      slot=account.current_slot(),
      num_blocks=min(wanted, most),
    )
    self._outbox.ask(borrow.creditor, request, account)

  def _end(self, account: Account) -> None:
    account.borrow = None
    account.phase = Phase.IDLE

  def _begin_move(
    self,
    account: Account,
    logical_id: int,
    creditor: InstanceId,
    grant: Grant,
  ) -> PendingMove:
    table = account.table
    old = table.location(logical_id)
    self._pool.begin_move(old.block_id)
    new = Location(
      instance=creditor, block_id=grant.block_id, epoch=grant.epoch
    )
    move = full_block_move(table.uid, logical_id, old, new, table.block_size)
    return PendingMove(move=move, old=old, new=new)

  def _return_copies(self, account: Account) -> None:
    """Gives grants back whose copies are not used."""
    borrow = account.current_borrow()
    creditor = borrow.moves[0].move.dst_instance
    for pending in borrow.moves:
      self._pool.cancel_move(pending.old.block_id)
    grants = tuple(grant_of(pending.new) for pending in borrow.moves)
    borrow.moves = []
    account.phase = Phase.RETURNING
    release = Release(slot=account.current_slot(), grants=grants)
    self._outbox.ask(creditor, release, account)
