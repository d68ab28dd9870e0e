"""No sharing: each instance has its own pool and nothing else (a baseline)."""

from collections.abc import Sequence

from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.messages import BlocksOf
from infinite_llm.scheduler.planning import (
  PlannedMove,
  PlannedRecall,
  PlanningConfig,
)
from infinite_llm.types import InstanceId, RequestUid


def rank_creditors(
  view: ClusterView,
  config: PlanningConfig,
  debtor: InstanceId,
  num_blocks: int,
) -> BlocksOf:
  """Proposes nobody."""
  return ()


def choose_victim(
  movable: Sequence[tuple[RequestUid, int]],
) -> RequestUid | None:
  """Moves nothing."""
  return None


def plan_moves(
  view: ClusterView, config: PlanningConfig
) -> tuple[PlannedMove, ...]:
  """Plans nothing."""
  return ()


def plan_recalls(
  view: ClusterView, config: PlanningConfig
) -> tuple[PlannedRecall, ...]:
  """Plans nothing: nothing is elsewhere."""
  return ()
