"""Policies by name: pure functions from a view of the cluster to decisions."""

from collections.abc import Sequence
from typing import Protocol

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.ledger import ClusterView
from infinite_llm.scheduler.policies import borrow, static
from infinite_llm.types import InstanceId, RequestUid


class Policy(Protocol):
  """How rBlocks are shared. A module with these functions is one."""

  def rank_creditors(
    self, view: ClusterView, debtor: InstanceId
  ) -> tuple[InstanceId, ...]:
    """Proposes whom a debtor may ask, best first."""
    ...

  def choose_victim(
    self, movable: Sequence[tuple[RequestUid, int]]
  ) -> RequestUid | None:
    """Picks the request whose rBlocks make room, from what each could move."""
    ...


POLICIES: dict[str, Policy] = {"borrow": borrow, "static": static}
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
