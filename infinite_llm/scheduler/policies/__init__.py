"""Policies by name: pure functions from a view of the cluster to decisions."""

import dataclasses
from collections.abc import Callable, Sequence

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.messages import BlocksOf
from infinite_llm.scheduler.planning import (
  PlannedMove,
  PlannedRecall,
  PlanningConfig,
)
from infinite_llm.scheduler.policies import (
  borrow,
  dgfm,
  greedy,
  migrate,
  static,
)
from infinite_llm.types import InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """How rBlocks are shared; what is not named is not done.

  All of it is pure: equal views give equal decisions, whatever the order of
  their lines.

  Attributes:
    borrows: Whether instances that run short ask others for rBlocks.
    migrates: Whether requests that run go elsewhere as a whole.
    swaps_to_host: Whether it rests on host memory, so that each instance must
      have some. Under any other policy those that have it swap, too.
    rank_creditors: Proposes whom a debtor may ask for so many rBlocks, best
      first, and each for how many at most.
    choose_victim: Picks the request whose rBlocks make room, from what each
      could move.
    plan_moves: Plans, before anybody asks, what is to go elsewhere.
    plan_recalls: Plans what is to come home.
  """

  borrows: bool = False
  migrates: bool = False
  swaps_to_host: bool = False
  rank_creditors: Callable[
    [ClusterView, PlanningConfig, InstanceId, int], BlocksOf
  ] = static.rank_creditors
  choose_victim: Callable[
    [Sequence[tuple[RequestUid, int]]], RequestUid | None
  ] = static.choose_victim
  plan_moves: Callable[
    [ClusterView, PlanningConfig], tuple[PlannedMove, ...]
  ] = static.plan_moves
  plan_recalls: Callable[
    [ClusterView, PlanningConfig], tuple[PlannedRecall, ...]
  ] = static.plan_recalls


_BORROW = Policy(
  borrows=True,
  rank_creditors=borrow.rank_creditors,
  choose_victim=borrow.choose_victim,
  plan_recalls=dgfm.plan_recalls,
)

POLICIES = {
  "borrow": _BORROW,
  "greedy": dataclasses.replace(_BORROW, plan_moves=greedy.plan_moves),
  "migrate": Policy(migrates=True, plan_moves=migrate.plan_moves),
  "static": Policy(),
  "swap": Policy(swaps_to_host=True),
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
