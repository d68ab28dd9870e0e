"""Live migration: whole requests move to where there is room (a baseline).

A request stays in one place, so a context can be no longer than a pool; what
this mends is room that lies in pieces on many instances.
"""

import math

from infinite_llm.scheduler.cluster_view import (
  ClusterView,
  LedgerLine,
  Placement,
)
from infinite_llm.scheduler.planning import PlannedMove, PlanningConfig
from infinite_llm.types import InstanceId


def plan_moves(
  view: ClusterView, config: PlanningConfig
) -> tuple[PlannedMove, ...]:
  """Plans one migration for each instance on which a request waits for room.

  Args:
    view: The cluster.
    config: Who has room, and how many moves.

  Returns:
    Moves of whole requests, of the instance that lacks most first. The smallest
    request goes that makes enough room, or else the largest one, to the
    emptiest instance that takes it whole, and there to the cheapest link of
    equals.
  """
  room = {
    line.instance: line.lendable
    for line in view.lines
    if line.use < config.creditor_use and not line.num_waiting
  }
  free = {line.instance: line.free for line in view.lines}
  owned = view.by_owner()
  short = [line for line in view.lines if line.next_blocks > line.free]
  short.sort(key=lambda line: (line.free - line.next_blocks, line.instance))
  plan: list[PlannedMove] = []
  for line in short:
    if len(plan) == config.max_moves:
      break
    for size, placement in _by_worth(line, owned.get(line.instance, [])):
      dst = _emptiest(view, room, free, line.instance, size)
      if dst is not None:
        room[dst] -= size
        free[dst] -= size
        move = PlannedMove(
          uid=placement.blocks.uid,
          owner=line.instance,
          num_blocks=size,
          dst=dst,
          with_request=True,
        )
        plan.append(move)
        break
  return tuple(plan)


def _by_worth(
  line: LedgerLine, placements: list[Placement]
) -> list[tuple[int, Placement]]:
  """Requests that could go and their sizes, the one to prefer first."""
  lacking = line.next_blocks - line.free
  sizes = [
    (placement.blocks.holders[0][1], placement)
    for placement in placements
    if placement.blocks.movable and len(placement.blocks.holders) == 1
  ]
  sizes.sort(
    key=lambda entry: (
      entry[0] < lacking,
      entry[0] if entry[0] >= lacking else -entry[0],
      entry[1].blocks.uid,
    )
  )
  return sizes


def _emptiest(
  view: ClusterView,
  room: dict[InstanceId, int],
  free: dict[InstanceId, int],
  owner: InstanceId,
  size: int,
) -> InstanceId | None:
  """Where a request fits best, if anywhere."""
  ranks = [
    (-free[instance], view.links.cost_s(owner, instance), instance)
    for instance, lendable in room.items()
    if instance != owner
    and lendable >= size
    and view.links.cost_s(owner, instance) < math.inf
  ]
  return min(ranks)[2] if ranks else None
