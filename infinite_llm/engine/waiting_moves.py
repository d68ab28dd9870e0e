"""Moves of rBlocks that no exchange has taken yet."""

import collections
import itertools
from collections.abc import Iterable

from infinite_llm.config import EngineConfig
from infinite_llm.engine.group_inputs import shift_of
from infinite_llm.scheduler.effects import Move
from infinite_llm.types import Quota, Shift


class WaitingMoves:
  """Queues of moves, one for each instance of this process, in their order."""

  def __init__(self, config: EngineConfig, num_own: int):
    """Begins with none.

    Args:
      config: Sizes.
      num_own: Instances of this process.
    """
    self._num_instances = config.num_instances
    self._buckets = config.lending.exchange_buckets
    self._moves: list[list[Move]] = [[] for _ in range(num_own)]

  @property
  def exchange(self) -> tuple[tuple[Shift, Quota], ...]:
    """Shifts that carry them, ascending, each with the quota that it needs.

    That is the smallest bucket that takes all those of each instance, or the
    largest bucket. Empty if there are none.
    """
    if not any(self._moves):  # Nearly always, and it is asked in each step.
      return ()
    most = collections.Counter[Shift]()
    for moves in self._moves:
      # Of two counts the larger one stays.
      most |= collections.Counter(
        shift_of(move, self._num_instances) for move in moves
      )
    return tuple(
      (shift, self._quota_for(count)) for shift, count in sorted(most.items())
    )

  def add(self, own: int, moves: Iterable[Move]) -> None:
    """Queues moves behind the others.

    Args:
      own: Which of this process's instances they are from.
      moves: The moves, in order.

    Raises:
      InvariantError: If one does not leave its instance.
    """
    moves = tuple(moves)
    for move in moves:
      shift_of(move, self._num_instances)
    self._moves[own].extend(moves)

  def next(self, own: int, shift: Shift, quota: Quota) -> tuple[Move, ...]:
    """What one exchange carries of those by a shift, the oldest first.

    Args:
      own: Which of this process's instances they are from.
      shift: Of the exchange.
      quota: Of the exchange, which may be less than they need.

    Returns:
      As many moves as the quota takes; they wait until they are dropped.
    """
    wanted = (
      move
      for move in self._moves[own]
      if shift_of(move, self._num_instances) == shift
    )
    return tuple(itertools.islice(wanted, quota))

  def drop(self, own: int, sent: Iterable[Move]) -> None:
    """Forgets moves that were sent; the others go on waiting, in order."""
    gone = set(sent)
    self._moves[own] = [x for x in self._moves[own] if x not in gone]

  def _quota_for(self, count: int) -> Quota:
    return next((x for x in self._buckets if x >= count), self._buckets[-1])
