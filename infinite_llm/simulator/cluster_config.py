"""What a simulated cluster is made of."""

import dataclasses
import math

from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.errors import ConfigError
from infinite_llm.rules import require, require_seconds
from infinite_llm.scheduler.performance_model import PerformanceModel
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.policies import get_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
  """A cluster to simulate.

  Attributes:
    num_instances: I; all of them may lend to each other.
    num_blocks: N, rBlocks per instance with the null block.
    block_size: P, tokens per rBlock.
    lending: Policy and periods.
    scheduler: Sizes of a step.
    has_dgfm: Whether circles of debts are dissolved; if not, what the gManager
      says about them is not passed on.
    host_blocks: rBlocks of host memory per instance with the null block, for
      policies that rest on it; others have none here, to compare with.
    min_delay_s: Shortest way of a message.
    max_delay_s: Longest way of a message.
    most_s: Simulated seconds after which a run ends anyway.
    seed: Draws the delays.
  """

  num_instances: int
  num_blocks: int
  block_size: int = 64
  lending: LendingConfig
  scheduler: SchedulerConfig
  has_dgfm: bool = True
  host_blocks: int = 0
  min_delay_s: float = 0.0005
  max_delay_s: float = 0.001
  most_s: float = 3600.0
  seed: int = 0

  def __post_init__(self):
    for name, least in (
      ("num_instances", 1),
      ("num_blocks", 2),
      ("block_size", 1),
      (
        "host_blocks",
        2 if get_policy(self.lending.policy).swaps_to_host else 0,
      ),
    ):
      value = getattr(self, name)
      if value < least:
        raise ConfigError(f"{name} must be at least {least}; got {value!r}.")
    if self.num_instances > 1:
      self.lending.check_pool(self.num_blocks - 1)
    require(
      0 <= self.min_delay_s <= self.max_delay_s < math.inf,
      "min_delay_s and max_delay_s",
      "not negative, finite and in this order",
      (self.min_delay_s, self.max_delay_s),
    )
    require_seconds(self, "most_s")

  def planning(self, performance: PerformanceModel) -> PlanningConfig:
    """What the gManager of the cluster plans by."""
    return PlanningConfig.of(self.lending, self.block_size, performance)

  @property
  def reachable_tokens(self) -> int:
    """Tokens that one request could have if it were alone."""
    own = self.num_blocks - 1
    if not get_policy(self.lending.policy).borrows:
      return own * self.block_size
    lent = max(own - (self.lending.headroom_blocks or 0), 0)
    if self.lending.max_lent_blocks is not None:
      lent = min(lent, self.lending.max_lent_blocks)
    return (own + lent * (self.num_instances - 1)) * self.block_size
