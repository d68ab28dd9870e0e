"""Borrowing on demand: DistKV-LLM, the paper's first version.

A full instance asks for creditors and moves rBlocks of its longest request to
them (arXiv 2401.02669v1, global debt ledger and its ranking of creditors).
"""

from collections.abc import Sequence

from infinite_llm.scheduler.ledger import ClusterView
from infinite_llm.types import InstanceId, RequestUid

MAX_CANDIDATES = 3
"""Creditors proposed at a time."""


def rank_creditors(
  view: ClusterView, debtor: InstanceId
) -> tuple[InstanceId, ...]:
  """Proposes whom to ask for rBlocks.

  Args:
    view: The cluster as the ledger knows it.
    debtor: Who wants to borrow.

  Returns:
    At most three other instances with room: most room first, then the nearest
    by number, then the lowest number.
  """
  with_room = [
    line for line in view.lines if line.instance != debtor and line.lendable > 0
  ]
  with_room.sort(
    key=lambda line: (
      -line.lendable,
      abs(line.instance - debtor),
      line.instance,
    )
  )
  return tuple(line.instance for line in with_room[:MAX_CANDIDATES])


def choose_victim(
  movable: Sequence[tuple[RequestUid, int]],
) -> RequestUid | None:
  """Picks the request whose rBlocks are to make room.

  The longest one: a request with rBlocks elsewhere runs in group programs, and
  short requests are to be spared that.

  Args:
    movable: `(uid, number of rBlocks that could move)` of each request.

  Returns:
    The one with the most, the lowest uid of equals; None if none has any.
  """
  candidates = [(-count, uid) for uid, count in movable if count > 0]
  return min(candidates)[1] if candidates else None
