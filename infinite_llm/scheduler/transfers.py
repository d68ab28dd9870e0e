"""All that is done about an account's rBlocks, by what is under way with it."""

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Account, Phase
from infinite_llm.scheduler.borrowing import Borrowing
from infinite_llm.scheduler.effects import Effect
from infinite_llm.scheduler.lease_messages import (
  CommitReply,
  FetchReply,
  Grant,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
  SyncReply,
)
from infinite_llm.scheduler.mailbox import Outbox, Pending
from infinite_llm.scheduler.messages import (
  Reply,
)
from infinite_llm.scheduler.recalling import Recalling
from infinite_llm.scheduler.syncing import Syncing
from infinite_llm.types import FaultPoint, InstanceId


class Transfers:
  """Goes on with borrows, recalls and syncs of accounts.

  Attributes:
    borrowing: From home to creditors.
    recalling: From a creditor home.
    syncing: Installs tables anew.
  """

  def __init__(
    self,
    pool: BlockPool,
    outbox: Outbox[Account],
    effects: list[Effect],
    faults: FaultPoint,
  ):
    """Makes the moving side of one instance.

    Args:
      pool: Its rBlocks.
      outbox: Takes its messages.
      effects: Takes what the data plane is to do.
      faults: What goes wrong.
    """
    self._outbox = outbox
    self.borrowing = Borrowing(pool, outbox, effects, faults)
    self.recalling = Recalling(pool, outbox, effects, faults)
    self.syncing = Syncing(outbox)

  def on_proved(self, account: Account) -> None:
    """Gives up the old copies of rBlocks that were switched."""
    self._current(account).on_proved(account)

  def roll_back(self, account: Account) -> None:
    """Returns to the old copies of rBlocks that were switched."""
    self._current(account).roll_back(account)

  def abandon(self, account: Account) -> None:
    """Lets go of what the table of an account to be closed does not name."""
    if account.borrow or account.recall:
      self._current(account).abandon(account)

  def on_restarted(self, account: Account, creditor: InstanceId) -> None:
    """Ends what is under way with a creditor that lost everything."""
    if account.borrow or account.recall:
      self._current(account).on_restarted(account, creditor)
    self.syncing.on_restarted(account, creditor)

  def on_reply(
    self, creditor: InstanceId, pending: Pending[Account], reply: Reply
  ) -> None:
    """Takes a creditor's answer to what an account asked."""
    account = pending.context
    if account.is_closed:
      self._on_closed(creditor, pending, reply)
      return
    match pending.body, reply:
      case _, ReserveReply():
        self.borrowing.on_reserved(account, creditor, reply)
      case _, CommitReply():
        self.borrowing.on_committed(account, creditor, reply)
      case Release(grants=grants), ReleaseReply():
        account.end_leases(creditor, grants)
        self._current(account).on_returned(account, creditor, reply)
      case _, FetchReply():
        self.recalling.on_fetched(account, reply)
      case _, SyncReply():
        self.syncing.on_synced(account, creditor, reply)
      case _:
        raise InvariantError(
          f"{type(reply).__name__} from instance {creditor} does not answer"
          f" {type(pending.body).__name__}."
        )

  def give_back(
    self, account: Account, creditor: InstanceId, grants: tuple[Grant, ...]
  ) -> None:
    """Ends leases of a closed account."""
    if grants:
      release = Release(slot=account.current_slot(), grants=grants)
      self._outbox.ask(creditor, release, account)

  def _on_closed(
    self, creditor: InstanceId, pending: Pending[Account], reply: Reply
  ) -> None:
    """Gives back what an answer to a closed account brings."""
    account = pending.context
    match pending.body, reply:
      case Reserve(), ReserveReply(grants=grants):
        account.add_leases(creditor, grants)
        self.give_back(account, creditor, grants)
      case Release(grants=grants), ReleaseReply():
        account.end_leases(creditor, grants)
      case _:
        pass

  def _current(self, account: Account) -> Borrowing | Recalling:
    if account.phase is Phase.IDLE:
      raise InvariantError(
        f"Nothing is under way with request {account.table.uid}."
      )
    return self.recalling if account.recall else self.borrowing
