"""What borrows and recalls have in common: whose rBlocks, and whom to tell."""

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import Location
from infinite_llm.scheduler.account import Account
from infinite_llm.scheduler.effects import Effect
from infinite_llm.scheduler.lease_messages import Grant
from infinite_llm.scheduler.mailbox import Outbox
from infinite_llm.types import FaultPoint


class Mover:
  """Moves rBlocks of one instance's accounts, in one direction."""

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
    self._pool = pool
    self._outbox = outbox
    self._effects = effects
    self._faults = faults


def grant_of(location: Location) -> Grant:
  """What a message names an rBlock at a creditor by."""
  return Grant(block_id=location.block_id, epoch=location.epoch)
