"""Moves of rBlocks that no exchange has taken yet."""

import itertools
from collections.abc import Iterable, Sequence

from infinite_llm.cache.movement import Payloads
from infinite_llm.config import EngineConfig
from infinite_llm.engine.group_inputs import fill_payloads, shift_of
from infinite_llm.scheduler.effects import Move
from infinite_llm.types import Shift


class WaitingMoves:
  """Queues of moves, one for each instance of this process, in their order."""

  def __init__(self, config: EngineConfig, num_own: int):
    """Begins with none.

    Args:
      config: Sizes.
      num_own: Instances of this process.
    """
    self._num_instances = config.num_instances
    self._quota = config.lending.exchange_blocks
    self._moves: list[list[Move]] = [[] for _ in range(num_own)]

  @property
  def shifts(self) -> tuple[Shift, ...]:
    """Shifts that carry them, ascending; empty if there are none."""
    moves = itertools.chain.from_iterable(self._moves)
    return tuple(sorted({shift_of(m, self._num_instances) for m in moves}))

  def add(self, own: int, moves: Iterable[Move]) -> None:
    """Queues moves behind the others.

    Args:
      own: Which of this process's instances they are from.
      moves: The moves, in order.
    """
    self._moves[own].extend(moves)

  def take(
    self, shifts: Sequence[Shift], joins: Sequence[bool]
  ) -> tuple[list[dict[Shift, Payloads]], list[tuple[Move, ...]]]:
    """Takes what one exchange carries; the others go on waiting, in order.

    Args:
      shifts: Those that run; moves by others wait.
      joins: Whether each instance sends anything.

    Returns:
      For each instance payloads of all these shifts, and the moves in them.
    """
    payloads: list[dict[Shift, Payloads]] = []
    sent: list[tuple[Move, ...]] = []
    for own, joining in enumerate(joins):
      moves = self._moves[own] if joining else []
      mine, waiting = fill_payloads(
        moves, shifts, self._num_instances, self._quota
      )
      payloads.append(mine)
      held = set(waiting)
      sent.append(tuple(move for move in moves if move not in held))
      if joining:
        self._moves[own] = waiting
    return payloads, sent
