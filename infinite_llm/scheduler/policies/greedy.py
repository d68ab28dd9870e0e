"""The greedy throughput planner: Infinite-LLM, the paper's second version.

A long request fills an instance's memory, so few others run beside it and its
compute lies idle; instances with short requests have memory to spare. Moving
rBlocks of the first to the second makes room for a larger batch at little cost,
for attention does not care who does it (arXiv 2401.02669v2, Algorithm 1).
"""

import math

import numpy as np
from numpy.typing import NDArray

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.performance_model import PerformanceModel, coupled
from infinite_llm.scheduler.planning import PlannedMove, PlanningConfig
from infinite_llm.scheduler.policies.borrow import (
  choose_victim,
  rank_creditors,
)
from infinite_llm.scheduler.policies.dgfm import plan_recalls
from infinite_llm.types import InstanceId, RequestUid

__all__ = [
  "BORROWS",
  "SWAPS_TO_HOST",
  "choose_victim",
  "plan_moves",
  "plan_recalls",
  "rank_creditors",
]

BORROWS = True
SWAPS_TO_HOST = False

_MAX_CHOICES = 512
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
    self._waiting = [
      line.num_waiting if line.free < line.next_blocks else 0 for line in lines
    ]
    # What a creditor may take without becoming full itself.
    used_at_most = np.floor(config.creditor_use * self._capacity)
    spare = used_at_most - (self._capacity - self._free)
    lendable = np.array([line.lendable for line in lines], np.int64)
    self._room = np.maximum(np.minimum(lendable, spare), 0).astype(np.int64)
    self._is_debtor = np.zeros(len(lines), bool)
    self._is_creditor = np.zeros(len(lines), bool)
    self._read_placements()
    self._layer_s = model.layers_s(self._batch, self._tokens)
    self._couple()

  def _read_placements(self) -> None:
    """Notes who attends how much, who owes whom, and what could move."""
    self._tokens = np.zeros(len(self._lines))
    self._debts: list[tuple[InstanceId, InstanceId]] = []
    # Debtors of each position: they must not become its creditors.
    self._debtors_of: list[set[int]] = [set() for _ in self._lines]
    self._movable: list[list[tuple[int, RequestUid, int]]] = [
      [] for _ in self._lines
    ]
    for placement in self._view.placements:
      owner = self._at.get(placement.owner)
      size = 0
      for holder, count in placement.blocks.holders:
        position = self._at.get(holder)
        size += count
        if position is None:
          continue
        self._tokens[position] += count * self._config.block_size
        if owner is not None and position != owner:
          self._debts.append((owner, position))
          self._debtors_of[position].add(owner)
      if owner is not None and placement.blocks.movable:
        self._movable[owner].append(
          (size, -placement.blocks.uid, placement.blocks.movable)
        )
    for requests in self._movable:
      requests.sort()  # The longest is last; of equals the lowest uid.

  def _couple(self) -> None:
    """Finds the groups of instances that step together."""
    members: dict[int, list[int]] = {}
    for position, root in coupled(range(len(self._lines)), self._debts).items():
      members.setdefault(root, []).append(position)
    self._group = [0] * len(self._lines)
    self._members = dict(members)
    for root, positions in members.items():
      for position in positions:
        self._group[position] = root

  def debtors(self) -> list[int]:
    """Positions that may borrow, smallest batch first."""
    order = [
      n
      for n, line in enumerate(self._lines)
      if line.num_running < self._config.debtor_batch and self._movable[n]
    ]
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
    possible = (self._room > 0) & ~self._is_debtor
    possible[debtor] = False
    possible[list(self._debtors_of[debtor])] = False
    use = np.where(
      possible, 1 - self._free / np.maximum(self._capacity, 1), np.inf
    )
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
    choices = np.linspace(1, most, _MAX_CHOICES).astype(np.int64)
    # One more request runs at each of these, which is where gains jump.
    needed = self._lines[debtor].next_blocks
    num_more = min(self._waiting[debtor], _MAX_CHOICES)
    jumps = needed * np.arange(1, num_more + 1) - self._free[debtor]
    return np.union1d(choices, jumps[(jumps > 0) & (jumps <= most)])

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
    batch = self._batch[creditor] + np.zeros(len(choices))
    slowest_s = np.maximum(
      self._model.layers_s(self._batch[debtor] + admitted, owned),
      self._model.layers_s(batch, hosted),
    )
    before = 0.0
    total_batch = admitted.astype(np.float64)
    for group in {self._group[debtor], self._group[creditor]}:
      members = self._members[group]
      group_batch = float(self._batch[members].sum())
      group_s = float(self._layer_s[members].max())
      if len(members) > 1:
        group_s += self._model.exchange_s
      before += self._model.throughput(int(group_batch), group_s)
      total_batch += group_batch
      others = [n for n in members if n not in (debtor, creditor)]
      if others:
        slowest_s = np.maximum(slowest_s, self._layer_s[others].max())
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
    self._is_debtor[debtor] = self._is_creditor[creditor] = True
    both = [debtor, creditor]
    self._layer_s[both] = self._model.layers_s(
      self._batch[both], self._tokens[both]
    )
    joined, kept = self._group[debtor], self._group[creditor]
    if joined != kept:
      for position in self._members[joined]:
        self._group[position] = kept
      self._members[kept] += self._members.pop(joined)
