"""No sharing: each instance has its own pool and nothing else (a baseline)."""

from collections.abc import Sequence

from infinite_llm.scheduler.ledger import ClusterView
from infinite_llm.types import InstanceId, RequestUid


def rank_creditors(
  view: ClusterView,
  debtor: InstanceId,
) -> tuple[InstanceId, ...]:
  """Proposes nobody."""
  return ()


def choose_victim(
  movable: Sequence[tuple[RequestUid, int]],
) -> RequestUid | None:
  """Moves nothing."""
  return None
