"""What an rManager's heartbeats say of its instance."""

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.messages import Heartbeat
from infinite_llm.types import Epoch, value_type


@value_type
class Demand:
  """What an instance's own requests are to get.

  Attributes:
    num_waiting: Requests that wait to run.
    next_blocks: rBlocks that the first of them needs; 0 if there is none.
    next_arrival: Its arrival number; 0 if there is none.
    promised: rBlocks that running requests are still to get for tokens that
      they have.
    local_blocks: rBlocks of running requests that have none elsewhere and need
      none there; only told if a request waits.
  """

  num_waiting: int = 0
  next_blocks: int = 0
  next_arrival: int = 0
  promised: int = 0
  local_blocks: int = 0


class Condition:
  """Sums up all books of one instance."""

  def __init__(self, pool: BlockPool, creditor: Creditor, debtor: Debtor):
    """Joins the books.

    Args:
      pool: HBM.
      creditor: What is hosted for others.
      debtor: Requests that run here.
    """
    self._demand = Demand()
    self._pool = pool
    self._creditor = creditor
    self._debtor = debtor

  def note_demand(self, demand: Demand) -> None:
    """Takes down what this instance's own requests are to get.

    What is promised to those that run is not lent.
    """
    self._demand = demand
    self._creditor.promised = demand.promised

  def heartbeat(self, leader_epoch: Epoch) -> Heartbeat:
    """Says everything.

    Args:
      leader_epoch: Newest epoch of a leading gManager that was heard of.
    """
    demand = self._demand
    return Heartbeat(
      counts=self._pool.counts(),
      lendable=self._creditor.lendable,
      num_running=self._debtor.num_open,
      num_waiting=demand.num_waiting,
      next_blocks=demand.next_blocks,
      next_arrival=demand.next_arrival,
      promised=demand.promised,
      local_blocks=demand.local_blocks,
      lent=tuple(sorted(self._creditor.lent().items())),
      requests=self._debtor.requests(),
      leader_epoch=leader_epoch,
    )
