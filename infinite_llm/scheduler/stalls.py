"""Who makes room when requests wait for each other's rBlocks, and how long.

One rule for an engine, for a group of processes and for the simulators: when
nothing has gone on for some rounds of messages, the youngest request that runs
gives its rBlocks up, so the oldest always gets through. It stands aside until
one of those that ran with it has ended. Let in at once, it would take again
what it gave up before anybody else could borrow that, and be the youngest
again; and those that wait behind it on its instance would do the same.
"""

import itertools
from collections.abc import Iterable, Sequence

from infinite_llm.types import RequestUid

_ROUNDS_TOGETHER = 3
_ROUNDS_ALONE = 30
"""Rounds of messages to wait for; they may be lost again and again."""


def who_gives_up(
  running: Sequence[RequestUid], waiting: Sequence[RequestUid], rounds: int
) -> RequestUid | None:
  """Chooses the request that makes room for the others, or that fails.

  Args:
    running: Requests with rBlocks, by arrival.
    waiting: Requests that come in if none runs, by arrival.
    rounds: Rounds of messages in which nothing went on.

  Returns:
    The youngest that runs, or the first to wait; None if there is none, or it
    is too early to say.
  """
  if rounds < (_ROUNDS_TOGETHER if len(running) > 1 else _ROUNDS_ALONE):
    return None
  return running[-1] if running else next(iter(waiting), None)


class StandingAside:
  """Requests that gave their rBlocks up, and whom each of them waits for."""

  def __init__(self):
    """Starts without any."""
    self._awaited: dict[RequestUid, frozenset[RequestUid]] = {}

  @property
  def awaited(self) -> frozenset[RequestUid]:
    """Requests whose end lets others come back."""
    return frozenset(itertools.chain.from_iterable(self._awaited.values()))

  def add(self, uid: RequestUid, running: Iterable[RequestUid]) -> None:
    """Has a request stand aside.

    Args:
      uid: The request.
      running: Requests with rBlocks, with or without itself.
    """
    self._awaited[uid] = frozenset(running) - {uid}

  def ended(self, uid: RequestUid) -> list[RequestUid]:
    """Notes that a request ended, any one.

    Returns:
      Those that stand aside no more.
    """
    self._awaited.pop(uid, None)
    back = [each for each, those in self._awaited.items() if uid in those]
    for each in back:
      del self._awaited[each]
    return back
