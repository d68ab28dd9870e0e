"""Borrowing on demand: DistKV-LLM, the paper's first version.

A full instance asks for creditors and moves rBlocks of its longest request to
them (arXiv 2401.02669v1, global debt ledger and its ranking of creditors).
"""

import collections
import heapq
import math
from collections.abc import Sequence

from infinite_llm.scheduler.cluster_view import ClusterView, LedgerLine
from infinite_llm.scheduler.performance_model import coupled
from infinite_llm.types import InstanceId, RequestUid

MAX_CANDIDATES = 3
"""Creditors proposed at a time."""


def rank_creditors(
  view: ClusterView, debtor: InstanceId, num_blocks: int
) -> tuple[InstanceId, ...]:
  """Proposes whom to ask for rBlocks.

  Availability counts as far as it is needed: who has room for all of it is no
  better for having more. Among equals the cheapest link comes first, and then
  whoever has fewest others wait for the debtor's group steps that did not yet.

  Args:
    view: The cluster as the ledger knows it.
    debtor: Who wants to borrow.
    num_blocks: How much.

  Returns:
    At most three other instances with room: most of the wanted room first, then
    the cheapest link, then the smallest group of instances that debts join, the
    debtor's own before all, then most room at all, then the nearest by number,
    then the lowest number.
  """
  num_joined = _num_joined(view, debtor)

  def rank(line: LedgerLine) -> tuple[int, float, int, int, int, int]:
    return (
      -min(line.lendable, num_blocks),
      view.links.cost_s(debtor, line.instance),
      num_joined[line.instance],
      -line.lendable,
      abs(line.instance - debtor),
      line.instance,
    )

  possible = (
    line
    for line in view.lines
    if line.instance != debtor
    and line.lendable > 0
    and view.links.cost_s(debtor, line.instance) < math.inf
  )
  best = heapq.nsmallest(MAX_CANDIDATES, possible, key=rank)
  return tuple(line.instance for line in best)


def _num_joined(view: ClusterView, debtor: InstanceId) -> dict[InstanceId, int]:
  """How many each instance would join to a debtor that are not joined yet."""
  debts = [
    (line.instance, borrower)
    for line in view.lines
    for borrower, _ in line.debts
  ]
  instances = {debtor, *(i for debt in debts for i in debt)}
  instances.update(line.instance for line in view.lines)
  group = coupled(instances, debts)
  size = collections.Counter(group.values())
  size[group[debtor]] = 0
  return {instance: size[root] for instance, root in group.items()}


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
