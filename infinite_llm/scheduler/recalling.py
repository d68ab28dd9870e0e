"""How rBlocks of one request come home from a creditor, step by step.

Reserve places at home, have the creditor send the payloads there and install a
table without them, switch, wait for the proof, give the leases back. Every step
waits for the acknowledgement of the last; `Phase` says for which.
"""

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Account, PendingMove, Phase, Recall
from infinite_llm.scheduler.effects import GrantEpochs, full_block_move
from infinite_llm.scheduler.fault_points import Place
from infinite_llm.scheduler.lease_messages import (
  Fetch,
  FetchedEntry,
  FetchReply,
  Release,
  ReleaseReply,
)
from infinite_llm.scheduler.mover import Mover, grant_of
from infinite_llm.types import NO_EPOCH, InstanceId


class Recalling(Mover):
  """Moves rBlocks of accounts home, from one creditor per account at a time.

  When a recall has ended, its account is in `Phase.IDLE` without a `recall`.
  """

  def begin(
    self, account: Account, creditor: InstanceId, num_blocks: int
  ) -> None:
    """Starts a recall of an idle account's newest rBlocks at a creditor.

    The newest, because the oldest ones are those that may leave again.

    Args:
      account: Has at least `num_blocks` rBlocks there.
      creditor: Who is to send them.
      num_blocks: How many, at least 1; as many are free at home.
    """
    table = account.table
    homes = self._pool.allocate(num_blocks, table.uid)
    if homes is None:
      raise InvariantError(
        f"num_blocks must be at most {self._pool.num_free}, which are free on"
        f" instance {self._pool.instance}; got {num_blocks}."
      )
    entries = table.hosted_entries(creditor)[-num_blocks:]
    moves = [
      PendingMove(
        move=full_block_move(table.uid, logical_id, old, new, table.block_size),
        old=old,
        new=new,
      )
      for (logical_id, old), new in zip(entries, homes, strict=True)
    ]
    account.recall = Recall(creditor=creditor, moves=moves)
    account.phase = Phase.FETCHING
    self._effects.append(
      GrantEpochs(
        block_ids=tuple(home.block_id for home in homes),
        epochs=tuple(home.epoch for home in homes),
      )
    )
    fetch = Fetch(
      uid=table.uid,
      slot=account.current_slot(),
      entries=tuple(
        FetchedEntry(
          logical_id=pending.move.logical_id,
          grant=grant_of(pending.old),
          home=grant_of(pending.new),
        )
        for pending in moves
      ),
    )
    self._outbox.ask(creditor, fetch, account)

  def on_fetched(self, account: Account, reply: FetchReply) -> None:
    """Switches to the copies at home; the creditor's stay until the proof."""
    if reply.table_version is None:
      self._drop_copies(account)
      return
    recall = account.current_recall()
    account.versions[recall.creditor] = reply.table_version
    for pending in recall.moves:
      account.table.switch(pending.move.logical_id, pending.new)
    account.phase = Phase.SWITCHED

  def on_proved(self, account: Account) -> None:
    """Gives the creditor's copies back."""
    recall = account.current_recall()
    self._refuse_payloads(recall)
    for pending in recall.moves:
      self._pool.mark_live(pending.new.block_id)
    if recall.creditor not in account.leases:  # It began anew meanwhile.
      self._end(account)
      return
    account.phase = Phase.RETURNING
    release = Release(
      slot=account.current_slot(),
      grants=tuple(grant_of(pending.old) for pending in recall.moves),
    )
    self._outbox.ask(recall.creditor, release, account)

  def roll_back(self, account: Account) -> None:
    """Returns to the creditor's copies: those at home were not proved."""
    recall = account.current_recall()
    for pending in recall.moves:
      account.table.switch(pending.move.logical_id, pending.old)
    account.is_lost |= recall.creditor not in account.leases
    self._drop_copies(account)

  def on_returned(
    self, account: Account, creditor: InstanceId, reply: ReleaseReply
  ) -> None:
    """Goes on without the creditor's copies."""
    if reply.table_version is not None:
      account.versions[creditor] = reply.table_version
    self._end(account)

  def abandon(self, account: Account) -> None:
    """Lets go of what the table of an account to be closed does not name."""
    recall = account.current_recall()
    if account.phase in (Phase.FETCHING, Phase.SWITCHED):
      self._refuse_payloads(recall)
    if account.phase is Phase.FETCHING:
      self._free_copies(account, recall)

  def on_restarted(self, account: Account, creditor: InstanceId) -> None:
    """Ends a recall from a creditor that lost everything.

    Payloads that are here already may still be proved.
    """
    if account.current_recall().creditor != creditor:
      return
    if account.phase is Phase.FETCHING:
      self._drop_copies(account)
    elif account.phase is Phase.RETURNING:
      self._end(account)

  def _drop_copies(self, account: Account) -> None:
    """Ends a recall without its copies; a sync tells what the creditor has."""
    recall = account.current_recall()
    self._refuse_payloads(recall)
    self._free_copies(account, recall)
    account.must_sync = True
    self._end(account)

  def _free_copies(self, account: Account, recall: Recall) -> None:
    for pending in recall.moves:
      self._pool.free(pending.new.block_id, account.table.uid)

  def _refuse_payloads(self, recall: Recall) -> None:
    if self._faults(Place.HOME_EPOCHS_KEPT):
      return
    block_ids = tuple(pending.new.block_id for pending in recall.moves)
    self._effects.append(
      GrantEpochs(block_ids=block_ids, epochs=(NO_EPOCH,) * len(block_ids))
    )

  def _end(self, account: Account) -> None:
    account.recall = None
    account.phase = Phase.IDLE
