"""Policies by name: pure functions from a view of the cluster to decisions."""

from collections.abc import Sequence
from typing import Protocol

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.planning import (
  PlannedMove,
  PlannedRecall,
  PlanningConfig,
)
from infinite_llm.scheduler.policies import (
  borrow,
  greedy,
  migrate,
  static,
  swap,
)
from infinite_llm.types import InstanceId, RequestUid


class Policy(Protocol):
  """How rBlocks are shared. A module with these names is one.

  All of it is pure: equal views give equal decisions, whatever the order of
  their lines.
  """

  @property
  def BORROWS(self) -> bool:  # noqa: N802
    """Whether instances that run short ask others for rBlocks."""
    ...

  @property
  def SWAPS_TO_HOST(self) -> bool:  # noqa: N802
    """Whether a simulated instance has host memory for preempted requests."""
    ...

  def rank_creditors(
    self, view: ClusterView, debtor: InstanceId, num_blocks: int
  ) -> tuple[InstanceId, ...]:
    """Proposes whom a debtor may ask for rBlocks, best first."""
    ...

  def choose_victim(
    self, movable: Sequence[tuple[RequestUid, int]]
  ) -> RequestUid | None:
    """Picks the request whose rBlocks make room, from what each could move."""
    ...

  def plan_moves(
    self, view: ClusterView, config: PlanningConfig
  ) -> tuple[PlannedMove, ...]:
    """Plans, before anybody asks, what is to go elsewhere."""
    ...

  def plan_recalls(
    self, view: ClusterView, config: PlanningConfig
  ) -> tuple[PlannedRecall, ...]:
    """Plans what is to come home."""
    ...


POLICIES: dict[str, Policy] = {
  "borrow": borrow,
  "greedy": greedy,
  "migrate": migrate,
  "static": static,
  "swap": swap,
}
"""All policies; the names are those of `LendingConfig.policy`."""


def get_policy(name: str) -> Policy:
  """Finds a policy.

  Raises:
    ConfigError: If there is none of that name.
  """
  if name not in POLICIES:
    raise ConfigError(
      f"policy must be one of {', '.join(sorted(POLICIES))}; got {name!r}."
    )
  return POLICIES[name]
