"""What an rManager's heartbeats say of its instance."""

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.messages import Heartbeat
from infinite_llm.scheduler.swapping import Swapping
from infinite_llm.types import Epoch


class Condition:
  """Sums up all books of one instance."""

  def __init__(
    self,
    pool: BlockPool,
    creditor: Creditor,
    debtor: Debtor,
    swapping: Swapping,
  ):
    """Joins the books.

    Args:
      pool: HBM.
      creditor: What is hosted for others.
      debtor: Requests that run here.
      swapping: What lies in HOST.
    """
    self._waiting = (0, 0)
    self._pool = pool
    self._creditor = creditor
    self._debtor = debtor
    self._swapping = swapping

  def note_waiting(self, num_requests: int, next_blocks: int) -> None:
    """Takes down, for the gManager, what waits on this instance.

    Args:
      num_requests: Requests that wait to run.
      next_blocks: rBlocks that the first of them needs; 0 if there is none.
    """
    self._waiting = (num_requests, next_blocks)

  def heartbeat(self, leader_epoch: Epoch) -> Heartbeat:
    """Says everything.

    Args:
      leader_epoch: Newest epoch of a leading gManager that was heard of.
    """
    num_waiting, next_blocks = self._waiting
    return Heartbeat(
      counts=self._pool.counts(),
      lendable=self._creditor.lendable,
      host_free=self._swapping.num_free,
      num_running=self._debtor.num_open,
      num_waiting=num_waiting,
      next_blocks=next_blocks,
      lent=tuple(sorted(self._creditor.lent().items())),
      requests=self._debtor.requests(),
      leader_epoch=leader_epoch,
    )
