"""DGFM: dissolves circles of debts, so that KV comes home that can.

In time instances lend and borrow at once, and hold each other's KV while their
own is elsewhere. Debts are a graph; on a circle the smallest of them can be
taken home all the way round, for each instance gets as much room as it needs
(arXiv 2401.02669v1, debt-graph fragmented memory management).
"""

import collections
import dataclasses

from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.planning import PlannedRecall, PlanningConfig
from infinite_llm.types import InstanceId, RequestUid

type Debts = dict[InstanceId, dict[InstanceId, int]]
"""rBlocks by debtor and creditor; no zeros."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
  """Debts that can be taken home all the way round.

  Attributes:
    members: Each borrows from the next, the last one from the first.
    num_blocks: rBlocks that each takes home.
  """

  members: tuple[InstanceId, ...]
  num_blocks: int


def plan_recalls(
  view: ClusterView, config: PlanningConfig
) -> tuple[PlannedRecall, ...]:
  """Plans what is to be taken home so that no circle of debts is left.

  Args:
    view: The cluster.
    config: Gives the most circles that are dissolved.

  Returns:
    Recalls by debtor and creditor. Of a debtor's requests those with the
    fewest rBlocks at the creditor come first, so that more of them come home
    whole and need no group step any more.
  """
  held = _held(view)
  recalled: collections.Counter[tuple[InstanceId, InstanceId]] = (
    collections.Counter()
  )
  for circle in circles(debts(view), config.max_circles):
    creditors = (*circle.members[1:], circle.members[0])
    for edge in zip(circle.members, creditors, strict=True):
      recalled[edge] += circle.num_blocks
  plan: list[PlannedRecall] = []
  for (debtor, creditor), left in sorted(recalled.items()):
    for count, uid in sorted(held[debtor, creditor]):
      taken = min(count, left)
      if taken:
        recall = PlannedRecall(
          uid=uid, owner=debtor, num_blocks=taken, src=creditor
        )
        plan.append(recall)
      left -= taken
  return tuple(plan)


def debts(view: ClusterView) -> Debts:
  """The debt graph: what creditors lent, as far as the debtors say for whom."""
  lent = {
    (debtor, line.instance): count
    for line in view.lines
    for debtor, count in line.debts
  }
  graph: collections.defaultdict[InstanceId, dict[InstanceId, int]] = (
    collections.defaultdict(dict)
  )
  for (debtor, creditor), requests in sorted(_held(view).items()):
    named = sum(count for count, _ in requests)
    weight = min(named, lent.get((debtor, creditor), 0))
    if weight:
      graph[debtor][creditor] = weight
  return dict(graph)


def circles(graph: Debts, most: int) -> tuple[Circle, ...]:
  """Dissolves circles, first found first.

  A walk from creditor to creditor that comes back to itself has found one. Its
  smallest debts vanish, and the walk goes on before the first of them; an
  instance from which the walk found no way on is on no circle, and as debts
  only vanish, never will be. Each step of the walk ends a debt or an instance,
  or is on a circle, so the cost is about that of reading the graph, times the
  length of circles.

  Args:
    graph: Debts; not changed.
    most: Circles to find at most.

  Returns:
    The circles in the order in which they vanish.
  """
  left = {debtor: dict(row) for debtor, row in graph.items()}
  ways = {debtor: sorted(row, reverse=True) for debtor, row in graph.items()}
  ended: set[InstanceId] = set()
  found: list[Circle] = []
  for start in sorted(graph):
    path = [start] if start not in ended else []
    place = {start: 0}
    while path and len(found) < most:
      here = path[-1]
      options = ways.get(here)
      if not options:
        ended.add(path.pop())
        del place[here]
        continue
      there = options[-1]
      if there in ended:
        options.pop()
      elif there not in place:
        place[there] = len(path)
        path.append(there)
      else:
        members = tuple(path[place[there] :])
        circle = _dissolve(members, left, ways)
        found.append(circle)
        # Go on from the first member whose way vanished.
        first = next(
          n
          for n, (a, b) in enumerate(_edges(members), start=place[there])
          if not left[a].get(b)
        )
        for member in path[first + 1 :]:
          del place[member]
        del path[first + 1 :]
  return tuple(found)


def _dissolve(
  members: tuple[InstanceId, ...],
  left: Debts,
  ways: dict[InstanceId, list[InstanceId]],
) -> Circle:
  """Subtracts a circle's smallest debt all the way round."""
  edges = _edges(members)
  num_blocks = min(left[a][b] for a, b in edges)
  for a, b in edges:
    left[a][b] -= num_blocks
    if not left[a][b]:
      del left[a][b]
      # The walk went this way, so it is the last of those left.
      ways[a].pop()
  return Circle(members=members, num_blocks=num_blocks)


def _edges(
  members: tuple[InstanceId, ...],
) -> list[tuple[InstanceId, InstanceId]]:
  return list(zip(members, (*members[1:], members[0]), strict=True))


def _held(
  view: ClusterView,
) -> dict[tuple[InstanceId, InstanceId], list[tuple[int, RequestUid]]]:
  """`(rBlocks, request)` of each debtor at each creditor."""
  held: collections.defaultdict[
    tuple[InstanceId, InstanceId], list[tuple[int, RequestUid]]
  ] = collections.defaultdict(list)
  for placement in view.placements:
    for holder, count in placement.blocks.holders:
      if holder != placement.owner:
        held[placement.owner, holder].append((count, placement.blocks.uid))
  return dict(held)
