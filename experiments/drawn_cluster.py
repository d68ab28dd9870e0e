"""Clusters that are drawn by lot, and what a plan for them must not do."""

import random

import ml_collections

from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.messages import Heartbeat, RequestBlocks
from infinite_llm.scheduler.planning import PlannedMove, PlannedRecall
from infinite_llm.scheduler.policies import dgfm
from infinite_llm.types import PoolCounts


def draw_heartbeats(
  config: ml_collections.ConfigDict, num_instances: int
) -> list[Heartbeat]:
  """Draws the state of each instance of a cluster.

  Args:
    config: See `configs/control_plane_bench.py`.
    num_instances: How many.

  Returns:
    Full heartbeats whose books agree with each other.
  """
  rng = random.Random(config.seed)
  total = config.cluster.num_blocks // num_instances
  most = max(total // 200, 1)
  local: list[list[int]] = []
  is_full = [
    rng.random() < config.cluster.debtors for _ in range(num_instances)
  ]
  for instance in range(num_instances):
    if is_full[instance]:
      # What is left is for others' rBlocks, and too little for the next.
      local.append([int(total * 0.9), most, most])
    else:
      share = rng.uniform(0.1, 0.5) * total / config.cluster.requests
      local.append([max(int(share), 1)] * config.cluster.requests)
  lent: list[dict[int, int]] = [{} for _ in range(num_instances)]
  elsewhere: list[dict[int, int]] = [{} for _ in range(num_instances)]
  for debtor in range(num_instances):
    others = [n for n in range(num_instances) if n != debtor]
    for creditor in rng.sample(others, config.cluster.debts):
      if len(lent[creditor]) < 2 * config.cluster.debts:
        count = rng.randint(1, most)
        lent[creditor][debtor] = elsewhere[debtor][creditor] = count
  heartbeats = []
  for instance, sizes in enumerate(local):
    requests = []
    creditors = sorted(elsewhere[instance].items())
    for number, size in enumerate(sizes):
      holders = {instance: size}
      # Each creditor has rBlocks of one request: the first of them.
      if number < len(creditors):
        holders |= dict([creditors[number]])
      requests.append(
        RequestBlocks(
          uid=1 + instance * 1000 + number,
          holders=tuple(sorted(holders.items())),
          movable=size - 1,
        )
      )
    used, hosted = sum(sizes), sum(lent[instance].values())
    free = max(total - used - hosted, 0)
    counts = PoolCounts(
      used=used,
      free=free,
      hosted=hosted,
      reserved=0,
      total=used + hosted + free,
    )
    heartbeats.append(
      Heartbeat(
        counts=counts,
        lendable=0 if is_full[instance] else free,
        num_running=len(sizes),
        num_waiting=20 if is_full[instance] else 0,
        next_blocks=free + most if is_full[instance] else 0,
        lent=tuple(sorted(lent[instance].items())),
        requests=tuple(requests),
      )
    )
  return heartbeats


def is_sound(
  view: ClusterView,
  moves: tuple[PlannedMove, ...],
  recalls: tuple[PlannedRecall, ...],
) -> bool:
  """Whether there is a plan, nobody is given too much, and circles are gone."""
  room = {line.instance: line.lendable for line in view.lines}
  for move in moves:
    room[move.dst] -= move.num_blocks
  left = dgfm.debts(view)
  for recall in recalls:
    left[recall.owner][recall.src] -= recall.num_blocks
  graph = {
    debtor: {creditor: count for creditor, count in row.items() if count}
    for debtor, row in left.items()
  }
  return bool(
    moves and recalls and min(room.values()) >= 0 and not dgfm.circles(graph, 1)
  )
