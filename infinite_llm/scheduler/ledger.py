"""The global debt ledger: what the gManager knows of everybody's rBlocks.

Soft state: heartbeats alone build it, and a stale line does no harm, because a
creditor decides from its own books.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator

from infinite_llm.scheduler.cluster_view import LedgerLine
from infinite_llm.scheduler.gmanager_screening import fault_in_debts
from infinite_llm.scheduler.messages import BlocksOf, Heartbeat
from infinite_llm.types import InstanceId


class Recorded(enum.Enum):
  """What became of a heartbeat."""

  FULL = "it said everything, and is in force"
  CHANGE = "it changed what was in force"
  OLD = "a newer one came before it, or it is of an earlier incarnation"
  GAP = "what it changes is not in force; only its own numbers are now"
  ABSURD = "what it changes would not fit together; nothing was changed"


@dataclasses.dataclass(kw_only=True, slots=True)
class _Known:
  """The newest of one instance.

  Attributes:
    seq: Number of the heartbeat in force.
    has_gap: A later one could not be applied.
    debts: rBlocks lent to each debtor.
    line: The same, for policies.
  """

  seq: int
  has_gap: bool
  debts: dict[InstanceId, int]
  line: LedgerLine


class Ledger:
  """Newest line of each instance that is not silent."""

  def __init__(self):
    """Makes a ledger that knows nobody."""
    self._known: dict[InstanceId, _Known] = {}
    self._lendable = 0

  def __contains__(self, instance: InstanceId) -> bool:
    return instance in self._known

  def instances(self) -> tuple[InstanceId, ...]:
    """All known instances."""
    return tuple(self._known)

  def incomplete(self) -> tuple[InstanceId, ...]:
    """Instances of which changes were missed."""
    return tuple(i for i, known in self._known.items() if known.has_gap)

  def lines(self) -> tuple[LedgerLine, ...]:
    """All lines, by rising instance."""
    return tuple(known.line for _, known in sorted(self._known.items()))

  def lines_unordered(self) -> Iterator[LedgerLine]:
    """All lines, where their order is nothing to whoever asks."""
    return (known.line for known in self._known.values())

  def lendable_to(self, instance: InstanceId) -> int:
    """rBlocks that all others would lend."""
    known = self._known.get(instance)
    return self._lendable - (known.line.lendable if known else 0)

  def record(
    self,
    instance: InstanceId,
    incarnation: int,
    seq: int,
    heartbeat: Heartbeat,
    now_s: float,
  ) -> Recorded:
    """Takes a heartbeat in, if it can be.

    Args:
      instance: Who sent it.
      incarnation: The sender's.
      seq: Its number.
      heartbeat: What it says.
      now_s: When it came.

    Returns:
      What became of it.
    """
    known = self._known.get(instance)
    if known and incarnation < known.line.incarnation:
      return Recorded.OLD
    is_same = known is not None and incarnation == known.line.incarnation
    if known and is_same and seq <= known.seq:
      return Recorded.OLD
    if heartbeat.base is None:
      debts = dict(heartbeat.lent)
      self._set(instance, incarnation, seq, heartbeat, debts, now_s)
      return Recorded.FULL
    if known is None or not is_same or heartbeat.base != known.seq:
      if known and is_same:
        # It says all but debts and requests whatever it is a change of.
        self._set(
          instance,
          incarnation,
          known.seq,
          heartbeat,
          known.debts,
          now_s,
          has_gap=True,
        )
      return Recorded.GAP
    debts = _changed(known.debts, heartbeat.lent)
    counts = heartbeat.counts
    has_debts = debts or counts.hosted
    if has_debts and fault_in_debts(counts, debts.values()) is not None:
      return Recorded.ABSURD
    self._set(instance, incarnation, seq, heartbeat, debts, now_s)
    return Recorded.CHANGE

  def forget(self, instance: InstanceId) -> None:
    """Drops the line of an instance."""
    known = self._known.pop(instance)
    self._lendable -= known.line.lendable

  def silent_since(self, moment_s: float) -> tuple[InstanceId, ...]:
    """Instances of which nothing was heard after a moment."""
    # The one that was heard of last stands last, and they are asked for often.
    silent = itertools.takewhile(
      lambda known: known[1].line.heard_s <= moment_s, self._known.items()
    )
    return tuple(instance for instance, _ in silent)

  def _set(
    self,
    instance: InstanceId,
    incarnation: int,
    seq: int,
    heartbeat: Heartbeat,
    debts: dict[InstanceId, int],
    now_s: float,
    *,
    has_gap: bool = False,
  ) -> None:
    # Behind all others, as one that was not known.
    before = self._known.pop(instance, None)
    if before is None or debts is not before.debts:
      debts_of = tuple(sorted(debts.items()))
    else:  # Nearly always.
      debts_of = before.line.debts
    counts = heartbeat.counts
    line = LedgerLine(
      instance=instance,
      incarnation=incarnation,
      heard_s=now_s,
      capacity=counts.total,
      free=counts.free,
      lendable=heartbeat.lendable,
      num_running=heartbeat.num_running,
      num_waiting=heartbeat.num_waiting,
      next_blocks=heartbeat.next_blocks,
      next_arrival=heartbeat.next_arrival,
      promised=heartbeat.promised,
      local_blocks=heartbeat.local_blocks,
      debts=debts_of,
    )
    self._known[instance] = _Known(
      seq=seq, has_gap=has_gap, debts=debts, line=line
    )
    self._lendable += line.lendable - (before.line.lendable if before else 0)


def _changed(
  debts: dict[InstanceId, int], changes: BlocksOf
) -> dict[InstanceId, int]:
  """Debts after a change; a 0 says that there is nothing left."""
  if not changes:
    return debts
  return {i: count for i, count in {**debts, **dict(changes)}.items() if count}
