"""The greedy throughput planner: Infinite-LLM, the paper's second version.

A long request fills an instance's memory, so few others run beside it and its
compute lies idle; instances with short requests have memory to spare. Moving
rBlocks of the first to the second makes room for a larger batch at little cost,
for attention does not care who does it (arXiv 2401.02669v2, Algorithm 1).
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.performance_model import PerformanceModel, coupled
from infinite_llm.scheduler.planning import PlannedMove, PlanningConfig
from infinite_llm.types import RequestUid

_MAX_CHOICES = 128
"""Numbers of rBlocks that are tried for a move; more are sampled evenly."""


def plan_moves(
  view: ClusterView, config: PlanningConfig
) -> tuple[PlannedMove, ...]:
  """Plans moves that raise the throughput of the cluster, each by itself.

  Debtors are instances with a small batch, the smallest first; creditors have a
  small part of their memory in use, the emptiest first. The debtor's longest
  request gives the emptiest creditor as many rBlocks as gain the most; without
  a gain the debtor's turn is over.

  What waits at the debtor for rBlocks is thought to run once there is room. If
  there is room and requests wait all the same, they wait for something else,
  and moving does not help them.

  Args:
    view: The cluster.
    config: The performance model, thresholds and budget.

  Returns:
    Moves in the order in which they were found. An instance is debtor or
    creditor of a plan, never both.

  Raises:
    ConfigError: If there is no performance model.
  """
  if config.performance is None:
    raise ConfigError("performance must be a model for 'greedy'; got None.")
  planner = _Planner(view, config, config.performance)
  for debtor in planner.debtors():
    while len(planner.plan) < config.max_moves and planner.try_move(debtor):
      pass
  return tuple(planner.plan)


_NUM_SLOWEST = 3
"""Without a debtor and a creditor, one of these is still the slowest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
  """Instances that step together.

  Attributes:
    members: `[n]` positions.
    batch: Requests that they run.
    slowest: `(layer_s, position)` of the slowest of them, slowest first.
  """

  members: NDArray[np.int64]
  batch: int
  slowest: list[tuple[float, int]]


class _Planner:
  """What the cluster is thought to be like after the moves planned so far.

  Instances are counted by position `[I]` in the order of their numbers.
  """

  def __init__(
    self, view: ClusterView, config: PlanningConfig, model: PerformanceModel
  ):
    lines = sorted(view.lines, key=lambda line: line.instance)
    self.plan: list[PlannedMove] = []
    self._view = view
    self._config = config
    self._model = model
    self._lines = lines
    self._at = {line.instance: n for n, line in enumerate(lines)}
    self._batch = np.array([line.num_running for line in lines], np.float64)
    self._free = np.array([line.free for line in lines], np.int64)
    self._capacity = np.array([line.capacity for line in lines], np.int64)
    use = 1 - self._free / np.maximum(self._capacity, 1)
    self._waiting = [
      line.num_waiting if line.free < line.next_blocks else 0 for line in lines
    ]
    # What a creditor may take without becoming full itself.
    used_at_most = np.floor(config.creditor_use * self._capacity)
    spare = used_at_most - (self._capacity - self._free)
    lendable = np.array([line.lendable for line in lines], np.int64)
    self._room = np.maximum(np.minimum(lendable, spare), 0).astype(np.int64)
    self._is_creditor = [False] * len(lines)
    # `inf` for those that can lend nothing, or have become debtors.
    self._creditor_use = np.where(self._room > 0, use, np.inf)
    self._read_placements()
    self._layer_s = model.layers_s(self._batch, self._tokens)
    self._couple()

  def _read_placements(self) -> None:
    """Notes who attends how much, who owes whom, and what could move."""
    position_of = self._at
    blocks_at = [0] * len(self._lines)
    may_borrow = [
      line.num_running < self._config.debtor_batch for line in self._lines
    ]
    self._debts: list[tuple[int, int]] = []
    # Debtors of each position: they must not become its creditors.
    self._debtors_of: list[set[int]] = [set() for _ in self._lines]
    self._movable: list[list[tuple[int, RequestUid, int]]] = [
      [] for _ in self._lines
    ]
    for placement in self._view.placements:
      blocks = placement.blocks
      owner = position_of.get(placement.owner)
      size = 0
      for holder, count in blocks.holders:
        size += count
        is_home = holder == placement.owner  # Nearly always.
        position = owner if is_home else position_of.get(holder)
        if position is None:
          continue
        blocks_at[position] += count
        if owner is not None and not is_home:
          self._debts.append((owner, position))
          self._debtors_of[position].add(owner)
      if owner is not None and blocks.movable and may_borrow[owner]:
        self._movable[owner].append((size, -blocks.uid, blocks.movable))
    for requests in self._movable:
      requests.sort()  # The longest is last; of equals the lowest uid.
    self._tokens = np.array(blocks_at, np.float64) * self._config.block_size

  def _couple(self) -> None:
    """Finds the groups of instances that step together."""
    self._root = list(coupled(range(len(self._lines)), self._debts).values())
    members: dict[int, list[int]] = {}
    for position, root in enumerate(self._root):
      members.setdefault(root, []).append(position)
    self._groups = {
      root: self._group(np.array(positions))
      for root, positions in members.items()
    }

  def _group(self, members: NDArray[np.int64]) -> _Group:
    """What is to be known of instances that step together."""
    times_s = self._layer_s[members]
    count = min(_NUM_SLOWEST, len(members))
    top = np.argpartition(times_s, -count)[-count:].tolist()
    slowest = [(float(times_s[n]), int(members[n])) for n in top]
    return _Group(
      members=members,
      batch=int(self._batch[members].sum()),
      slowest=sorted(slowest, reverse=True),
    )

  def debtors(self) -> list[int]:
    """Positions that may borrow, smallest batch first."""
    order = [n for n, requests in enumerate(self._movable) if requests]
    return sorted(order, key=lambda n: (self._lines[n].num_running, n))

  def try_move(self, debtor: int) -> bool:
    """Plans the best move of a debtor's longest request, if one gains."""
    if (
      self._is_creditor[debtor]
      or self._batch[debtor] >= self._config.debtor_batch
      or not self._movable[debtor]
    ):
      return False
    creditor = self._emptiest(debtor)
    if creditor is None:
      return False
    size, negative_uid, movable = self._movable[debtor][-1]
    choices = self._choices(debtor, min(movable, int(self._room[creditor])))
    num_blocks = self._best(debtor, creditor, choices)
    if num_blocks == 0:
      return False
    if num_blocks == movable:
      self._movable[debtor].pop()
    else:
      self._movable[debtor][-1] = (size, negative_uid, movable - num_blocks)
    self._commit(debtor, creditor, num_blocks)
    self._join(debtor, creditor)
    self.plan.append(
      PlannedMove(
        uid=-negative_uid,
        owner=self._lines[debtor].instance,
        num_blocks=num_blocks,
        dst=self._lines[creditor].instance,
      )
    )
    return True

  def _emptiest(self, debtor: int) -> int | None:
    """The creditor with the smallest share in use, nearest of equals."""
    use = self._creditor_use.copy()
    use[[debtor, *self._debtors_of[debtor]]] = np.inf
    owner = self._lines[debtor].instance
    while (emptiest := float(use.min())) < math.inf:
      equals = np.flatnonzero(use == emptiest).tolist()
      ranks = [
        (self._view.links.cost_s(owner, self._lines[n].instance), n)
        for n in equals
      ]
      cost_s, best = min(ranks)
      if cost_s < math.inf:
        return best
      use[equals] = np.inf
    return None

  def _choices(self, debtor: int, most: int) -> NDArray[np.int64]:
    """Numbers of rBlocks worth trying, rising."""
    if most <= _MAX_CHOICES:
      return np.arange(1, most + 1)
    stride = -(-most // _MAX_CHOICES)
    choices = np.arange(most, 0, -stride)
    # One more request runs at each of these, which is where gains jump.
    needed = self._lines[debtor].next_blocks
    num_more = min(self._waiting[debtor], _MAX_CHOICES)
    jumps = needed * np.arange(1, num_more + 1) - self._free[debtor]
    jumps = jumps[(jumps > 0) & (jumps <= most)]
    return np.sort(np.concatenate([choices, jumps]))

  def _admitted(
    self, debtor: int, num_blocks: NDArray[np.int64]
  ) -> NDArray[np.int64]:
    """Waiting requests that a debtor can run with more rBlocks."""
    needed = max(self._lines[debtor].next_blocks, 1)
    return np.minimum(
      (self._free[debtor] + num_blocks) // needed, self._waiting[debtor]
    )

  def _loads(
    self, debtor: int, creditor: int, num_blocks: NDArray[np.int64]
  ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Requests admitted, and tokens attended by each, for each choice."""
    admitted = self._admitted(debtor, num_blocks)
    gone = num_blocks * self._config.block_size
    come = admitted * self._lines[debtor].next_blocks * self._config.block_size
    return (
      admitted,
      self._tokens[debtor] - gone + come,
      self._tokens[creditor] + gone,
    )

  def _best(
    self, debtor: int, creditor: int, choices: NDArray[np.int64]
  ) -> int:
    """The number of rBlocks that gains the most; 0 if none gains enough."""
    admitted, owned, hosted = self._loads(debtor, creditor, choices)
    # This runs for every move that is tried.
    slowest_s = np.maximum(
      self._model.layers_s(self._batch[debtor] + admitted, owned),
      self._model.layers_s(self._batch[creditor], hosted),
    )
    before = 0.0
    total_batch = admitted.astype(np.float64)
    for root in {self._root[debtor], self._root[creditor]}:
      group = self._groups[root]
      group_s = group.slowest[0][0]
      if len(group.members) > 1:
        group_s += self._model.exchange_s
      before += self._model.throughput(group.batch, group_s)
      total_batch += group.batch
      for others_s, position in group.slowest:
        if position not in (debtor, creditor):
          slowest_s = np.maximum(slowest_s, others_s)
          break
    slowest_s += self._model.exchange_s
    # Nobody may have anything to do, and gains nothing then.
    slowest_s = np.maximum(slowest_s, np.finfo(np.float64).tiny)
    gains = total_batch / (self._model.num_layers * slowest_s) - before
    best = int(gains.argmax())
    # Less than rounding could make up is no gain.
    enough = max(self._config.min_gain, 1e-9) * before
    return int(choices[best]) if gains[best] > enough else 0

  def _commit(self, debtor: int, creditor: int, num_blocks: int) -> None:
    """Notes what a move changes."""
    admitted, owned, hosted = (
      change[0]
      for change in self._loads(debtor, creditor, np.array([num_blocks]))
    )
    self._batch[debtor] += admitted
    self._waiting[debtor] -= int(admitted)
    needed = self._lines[debtor].next_blocks
    self._free[debtor] += num_blocks - admitted * needed
    self._free[creditor] -= num_blocks
    self._room[creditor] -= num_blocks
    self._tokens[debtor], self._tokens[creditor] = owned, hosted
    self._is_creditor[creditor] = True
    self._creditor_use[debtor] = np.inf
    if self._room[creditor] > 0:
      use = 1 - self._free[creditor] / self._capacity[creditor]
      self._creditor_use[creditor] = use
    else:
      self._creditor_use[creditor] = np.inf
    for position in (debtor, creditor):
      self._layer_s[position] = self._model.layer_s(
        int(self._batch[position]), float(self._tokens[position])
      )

  def _join(self, debtor: int, creditor: int) -> None:
    """Has the groups of both step together from now on."""
    joined, kept = self._root[debtor], self._root[creditor]
    members = self._groups[kept].members
    if joined != kept:
      moved = self._groups.pop(joined).members
      for position in moved.tolist():
        self._root[position] = kept
      members = np.concatenate([members, moved])
    self._groups[kept] = self._group(members)
