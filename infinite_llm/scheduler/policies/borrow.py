"""Borrowing on demand: DistKV-LLM, the paper's first version.

A full instance asks for creditors and moves rBlocks of its longest request to
them (arXiv 2401.02669v1, global debt ledger and its ranking of creditors).
"""

import bisect
import collections
import heapq
import math
from collections.abc import Sequence

from infinite_llm.scheduler.cluster_view import ClusterView, LedgerLine
from infinite_llm.scheduler.messages import BlocksOf
from infinite_llm.scheduler.performance_model import coupled
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.types import InstanceId, RequestUid

MAX_CANDIDATES = 3
"""Creditors proposed at a time."""


def rank_creditors(
  view: ClusterView,
  config: PlanningConfig,
  debtor: InstanceId,
  num_blocks: int,
) -> BlocksOf:
  """Proposes whom to ask for rBlocks.

  What creditors attend for the debtor is to be hidden behind what it attends
  itself: as long as there is room enough for that, nobody is asked for more
  (`hidden_blocks`). If there is not, memory counts more than time.

  Availability counts as far as it is needed: who has room for all of it is no
  better for having more. Among equals the cheapest link comes first, and then
  whoever has fewest others wait for the debtor's group steps that did not yet.

  Args:
    view: The cluster as the ledger knows it.
    config: How fast instances are, and whether that bounds the remote share.
    debtor: Who wants to borrow.
    num_blocks: How much.

  Returns:
    At most three other instances with room, and for how much to ask each: most
    of the wanted room first, then the cheapest link, then the smallest group of
    instances that debts join, the debtor's own before all, then most room at
    all, then the nearest by number, then the lowest number.
  """
  num_joined = _num_joined(view, debtor)
  possible = [
    line
    for line in view.lines
    if line.instance != debtor
    and line.lendable > 0
    and view.links.cost_s(debtor, line.instance) < math.inf
  ]
  bounds = _bounds(possible, view, config, debtor, num_blocks)

  def rank(line: LedgerLine) -> tuple[int, float, int, int, int, int]:
    return (
      -min(line.lendable, bounds[line.instance]),
      view.links.cost_s(debtor, line.instance),
      num_joined[line.instance],
      -line.lendable,
      abs(line.instance - debtor),
      line.instance,
    )

  best = heapq.nsmallest(MAX_CANDIDATES, possible, key=rank)
  asked = ((line.instance, bounds[line.instance]) for line in best)
  return tuple((instance, most) for instance, most in asked if most > 0)


def hidden_blocks(
  owner: LedgerLine,
  creditor: LedgerLine,
  config: PlanningConfig,
  at_most: int,
) -> int:
  """How many rBlocks more a creditor may lend without taking longer.

  In a group step all wait for the slowest, and the owner attends what it has at
  home beside what others attend for it. So the creditor is to need no more time
  for a layer, with the exchange, than the owner: both by the performance model,
  or where there is none, by how much they attend.

  Args:
    owner: Who borrows. What moves away makes room for as much.
    creditor: Who lends.
    config: How fast instances are, and the size of an rBlock.
    at_most: More are not asked for.

  Returns:
    How many; 0 if the creditor takes longer already.
  """
  model = config.performance
  owned, held = (line.capacity - line.free for line in (owner, creditor))
  if model is None:
    return max(min(owned - held, at_most), 0)
  most_s = model.layer_s(owner.num_running, owned * config.block_size)

  def needed_s(more: int) -> float:
    tokens = (held + more) * config.block_size
    return model.layer_s(creditor.num_running, tokens) + model.exchange_s

  if needed_s(at_most) <= most_s:
    return at_most
  numbers = range(at_most + 1)
  return max(bisect.bisect_right(numbers, most_s, key=needed_s) - 1, 0)


def _bounds(
  possible: Sequence[LedgerLine],
  view: ClusterView,
  config: PlanningConfig,
  debtor: InstanceId,
  num_blocks: int,
) -> dict[InstanceId, int]:
  """For how many rBlocks to ask each possible creditor at most."""
  everything = {line.instance: num_blocks for line in possible}
  owner = next((line for line in view.lines if line.instance == debtor), None)
  if owner is None or not config.bound_remote_share:
    return everything
  hidden = {
    line.instance: hidden_blocks(owner, line, config, num_blocks)
    for line in possible
  }
  rooms = (min(line.lendable, hidden[line.instance]) for line in possible)
  room = sum(heapq.nlargest(MAX_CANDIDATES, rooms))
  return hidden if room >= num_blocks else everything


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
