"""The global debt ledger: what the gManager knows of everybody's rBlocks.

Soft state: heartbeats alone build it, and a stale line does no harm, because a
creditor decides from its own books.
"""

import dataclasses

from infinite_llm.scheduler.messages import Heartbeat
from infinite_llm.types import InstanceId


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerLine:
  """One instance, as of its last heartbeat.

  Attributes:
    instance: Which one.
    free: rBlocks that nobody holds there.
    lendable: rBlocks that it would lend.
    debts: What each debtor has borrowed from it: `(debtor, rBlocks)`.
  """

  instance: InstanceId
  free: int
  lendable: int
  debts: tuple[tuple[InstanceId, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterView:
  """The ledger at one moment; what policies decide from.

  Attributes:
    lines: One per known instance, by rising number.
  """

  lines: tuple[LedgerLine, ...]


class Ledger:
  """Newest line of each instance."""

  def __init__(self):
    self._lines: dict[InstanceId, LedgerLine] = {}
    self._newest: dict[InstanceId, tuple[int, int]] = {}

  def record(
    self,
    instance: InstanceId,
    incarnation: int,
    seq: int,
    heartbeat: Heartbeat,
  ) -> bool:
    """Takes a heartbeat in, unless a newer one came before it.

    Args:
      instance: Who sent it.
      incarnation: The sender's.
      seq: Its number.
      heartbeat: What it says.

    Returns:
      Whether the instance was unknown until now.
    """
    is_new = instance not in self._lines
    age = (incarnation, seq)
    if is_new or age > self._newest[instance]:
      self._newest[instance] = age
      self._lines[instance] = LedgerLine(
        instance=instance,
        free=heartbeat.counts.free,
        lendable=heartbeat.lendable,
        debts=heartbeat.lent,
      )
    return is_new

  def view(self) -> ClusterView:
    """All lines, as a value."""
    return ClusterView(
      lines=tuple(line for _, line in sorted(self._lines.items()))
    )
