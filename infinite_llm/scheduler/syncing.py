"""How an owner and its creditors agree again on what is hosted."""

from infinite_llm.scheduler.account import Account, Phase
from infinite_llm.scheduler.lease_messages import (
  Grant,
  HostedEntry,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.mailbox import Outbox
from infinite_llm.types import InstanceId


class Syncing:
  """Has creditors install the tables of idle accounts anew.

  When a sync has ended, its account is in `Phase.IDLE`.
  """

  def __init__(self, outbox: Outbox[Account]):
    """Makes the syncing side of one instance.

    Args:
      outbox: Takes its messages.
    """
    self._outbox = outbox

  def begin(self, account: Account) -> None:
    """Asks all creditors of an idle account."""
    account.must_sync = False
    account.unsynced = set(account.table.creditors())
    for creditor in account.table.creditors():
      account.phase = Phase.SYNCING
      sync = Sync(
        uid=account.table.uid,
        slot=account.current_slot(),
        entries=tuple(
          HostedEntry(
            logical_id=logical_id,
            grant=Grant(block_id=location.block_id, epoch=location.epoch),
          )
          for logical_id, location in account.table.hosted_entries(creditor)
        ),
      )
      self._outbox.ask(creditor, sync, account)

  def on_synced(
    self, account: Account, creditor: InstanceId, reply: SyncReply
  ) -> None:
    """Names the new version; if rBlocks are missing, the account is lost."""
    if reply.table_version is None:
      account.is_lost = True
    else:
      account.versions[creditor] = reply.table_version
    self._end_for(account, creditor)

  def on_restarted(self, account: Account, creditor: InstanceId) -> None:
    """Awaits no answer of a creditor that holds nothing any more."""
    if creditor in account.unsynced:
      self._end_for(account, creditor)

  def _end_for(self, account: Account, creditor: InstanceId) -> None:
    account.unsynced.discard(creditor)
    if not account.unsynced:
      account.phase = Phase.IDLE
