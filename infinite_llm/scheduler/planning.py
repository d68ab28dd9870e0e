"""What planning policies are told, and what they answer."""

import dataclasses
import math

from infinite_llm.errors import ConfigError
from infinite_llm.lending_config import LendingConfig
from infinite_llm.scheduler.performance_model import PerformanceModel
from infinite_llm.types import InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningConfig:
  """Rules and budgets of a plan.

  Attributes:
    block_size: P, tokens per rBlock.
    performance: How fast instances are; only `greedy` needs to know.
    bound_remote_share: Whether a creditor is asked for no more than it attends
      in the debtor's own time, where there is room enough for that.
    debtor_batch: An instance whose batch is smaller than this may become a
      debtor: it has compute to spare.
    creditor_use: An instance of whose HBM pool a smaller share than this is in
      use may become a creditor: it has memory to spare.
    min_gain: A move must raise the throughput of the instances that it concerns
      by more than this share of it, for moving is work too.
    max_moves: Most moves of a plan.
    max_circles: Most circles of debts that a plan dissolves.
  """

  block_size: int = 64
  performance: PerformanceModel | None = None
  bound_remote_share: bool = False
  debtor_batch: int = 32
  creditor_use: float = 0.8
  min_gain: float = 0.0
  max_moves: int = 1000
  max_circles: int = 1000

  @classmethod
  def of(
    cls,
    lending: LendingConfig,
    block_size: int = 64,
    performance: PerformanceModel | None = None,
  ) -> "PlanningConfig":
    """What a configuration says of plans.

    Args:
      lending: Thresholds and budgets.
      block_size: P, tokens per rBlock.
      performance: How fast instances are, if that is known.
    """
    return cls(
      block_size=block_size,
      performance=performance,
      bound_remote_share=lending.bounds_remote_share,
      debtor_batch=lending.debtor_batch,
      creditor_use=lending.creditor_use,
      min_gain=lending.min_gain,
      max_moves=lending.max_moves,
      max_circles=lending.max_circles,
    )

  def __post_init__(self):
    for name in ("block_size", "debtor_batch", "max_moves", "max_circles"):
      value = getattr(self, name)
      if value < 1:
        raise ConfigError(f"{name} must be at least 1; got {value!r}.")
    if not 0 < self.creditor_use <= 1:
      raise ConfigError(
        f"creditor_use must be in (0, 1]; got {self.creditor_use!r}."
      )
    if not 0 <= self.min_gain < math.inf:
      raise ConfigError(
        f"min_gain must be finite and not negative; got {self.min_gain!r}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMove:
  """rBlocks of a request that are to go from its owner to another instance.

  Attributes:
    uid: The request.
    owner: The instance that runs it and holds them.
    num_blocks: How many, oldest first.
    dst: Where to.
    with_request: Whether the request itself goes too, and runs there then.
  """

  uid: RequestUid
  owner: InstanceId
  num_blocks: int
  dst: InstanceId
  with_request: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRecall:
  """rBlocks of a request that are to come home.

  Attributes:
    uid: The request.
    owner: The instance that runs it, and that they come to.
    num_blocks: How many.
    src: The creditor that holds them.
  """

  uid: RequestUid
  owner: InstanceId
  num_blocks: int
  src: InstanceId
