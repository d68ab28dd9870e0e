"""What one simulated cluster is like, drawn from its seed."""

import dataclasses
import random
from collections.abc import Mapping

from infinite_llm.config import CacheConfig, LendingConfig, SchedulerConfig
from infinite_llm.rules import (
  require,
  require_integer,
  require_positive,
  require_seconds,
  require_shares,
)
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.overflow import OverflowRule
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.simulator.faults import NetworkFaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
  """A cluster, its work, and what goes wrong there.

  Attributes:
    num_instances: I.
    num_blocks: N, rBlocks of each pool with the null one.
    host_blocks: rBlocks of each HOST pool with the null one; 0 if there is
      none.
    host_attention: Whether requests larger than all HBM keep rBlocks there.
    block_size: P, tokens per rBlock.
    lending: How pools are shared.
    scheduler: Sizes of steps.
    network: How messages fare until the cluster is healed.
    tick_s: Seconds between two ticks of an rManager; gManagers are called each
      `LendingConfig.leader_beat_s`.
    step_s: Seconds that a step is under way.
    exchange_s: Seconds within which waiting payloads are exchanged.
    copy_s: Seconds within which rBlocks are copied between tiers.
    request_every_s: Mean seconds between two requests.
    most_open: Requests that have not ended beyond which no more are made.
    long_answers: Probability that a request is to have up to 40 tokens beside
      its prompt, rather than up to 6.
    stops_early: Probability that a token is its request's last, unforeseen.
    trouble_every_s: Mean seconds between two faults that the adversary makes.
    plan_every_s: Mean seconds between two moves that the adversary orders.
    crash_s: Seconds for which somebody is down, at most.
    partition_s: Seconds for which a partition lasts, at most.
    clock_rate: How much faster or slower a clock may go, as a share.
    clock_jump: Probability that a clock that goes wrong also jumps ahead, by up
      to a lease.
    payload_lost: Probability that a payload of the exchange never arrives.
    payload_repeated: Probability that a payload is sent once more, later.
    copy_lost: Probability that a copy between tiers brings nothing.
    mishaps: How often each mishap happens inside the managers where it can.
    min_s: Seconds for which there is trouble, at least.
    min_messages: Messages that are delivered while there is trouble, at least.
    min_faults: Faults that happen, at least.
  """

  num_instances: int
  num_blocks: int
  host_blocks: int = 0
  host_attention: bool = False
  block_size: int = 8
  lending: LendingConfig
  scheduler: SchedulerConfig
  network: NetworkFaults
  tick_s: float = 0.1
  step_s: float = 0.03
  exchange_s: float = 0.1
  copy_s: float = 0.1
  request_every_s: float = 0.5
  most_open: int = 8
  long_answers: float = 0.15
  stops_early: float = 0.0
  trouble_every_s: float = 0.4
  plan_every_s: float = 0.3
  crash_s: float = 2.0
  partition_s: float = 2.0
  clock_rate: float = 0.04
  clock_jump: float = 0.0
  payload_lost: float = 0.0
  payload_repeated: float = 0.0
  copy_lost: float = 0.0
  mishaps: Mapping[str, float] = dataclasses.field(
    default_factory=dict[str, float]
  )
  min_s: float = 4.0
  min_messages: int = 300
  min_faults: int = 5

  def __post_init__(self):
    require_positive(
      self,
      "num_instances",
      "block_size",
      "most_open",
      "min_messages",
      "min_faults",
    )
    least_host = 2 if self.host_attention else 0
    for name, least in (("num_blocks", 2), ("host_blocks", least_host)):
      value = getattr(self, name)
      require_integer(name, value)
      require(value >= least, name, f"at least {least}", value)
    require_seconds(
      self,
      *("tick_s", "step_s", "exchange_s", "copy_s", "request_every_s"),
      *("trouble_every_s", "plan_every_s", "crash_s", "partition_s", "min_s"),
    )
    require_shares(
      self,
      *("long_answers", "stops_early", "clock_jump", "copy_lost"),
      *("payload_lost", "payload_repeated"),
    )
    require(
      0 <= self.clock_rate < 1, "clock_rate", "in [0, 1)", self.clock_rate
    )
    if self.num_instances > 1:
      self.lending.check_pool(self.num_blocks - 1)

  @property
  def reachable_blocks(self) -> int:
    """rBlocks of HBM that one request can have, if nobody else has any."""
    own = self.num_blocks - 1
    # Under "migrate" others lend, but only room for all of it.
    if not get_policy(self.lending.policy).borrows:
      return own
    return self.lending.reachable_blocks(own, self.num_instances)

  @property
  def most_blocks(self) -> int:
    """The same in both tiers: of HOST, it has that of its own instance."""
    if not self.host_attention:
      return self.reachable_blocks
    elsewhere = self.reachable_blocks - (self.num_blocks - 1)
    return self._cache.overflow_blocks + elsewhere

  @property
  def overflow(self) -> OverflowRule | None:
    """Which requests keep rBlocks in HOST while they run; None if none may."""
    if not self.host_attention:
      return None
    return OverflowRule(
      reachable_blocks=self.reachable_blocks,
      kept_blocks=self._cache.kept_blocks,
      slab_blocks=self._cache.slab_blocks,
    )

  @property
  def _cache(self) -> CacheConfig:
    return CacheConfig(
      block_size=self.block_size,
      num_blocks=self.num_blocks,
      host_blocks=self.host_blocks,
      host_attention=self.host_attention,
    )


_POLICIES = (
  *("borrow",) * 5,
  *("greedy",) * 3,
  *("swap",) * 2,
  *("static", "migrate"),
)
"""Each as often as there is something of it that can go wrong."""

_MISHAPS = {
  Mishap.ALLOCATION_FAILS: 0.05,
  Mishap.GRANT_FAILS: 0.1,
  Mishap.SWAP_FAILS: 0.2,
  Mishap.HEARTBEAT_SKIPPED: 0.05,
  Mishap.RANKING_FAILS: 0.1,
  Mishap.DEATH_BEFORE_ANSWER: 0.02,
  Mishap.DEATH_WHILE_SENDING: 0.001,
}
"""How often each happens where it can, in scenarios that have it."""


def draw_scenario(rng: random.Random) -> Scenario:
  """Draws a small cluster where memory is short and much goes wrong.

  Args:
    rng: Decides.
  """
  policy = rng.choice(_POLICIES)
  # Few instances with long requests that are moved often and fast, and some
  # room: debts go both ways, and recalls dissolve them.
  has_circles = get_policy(policy).borrows and rng.random() < 0.3
  num_instances = rng.randint(2, 3 if has_circles else 5)
  num_blocks = 20 if has_circles else rng.choice((7, 10, 14))
  # HOST, with any policy, as engines have it.
  host_blocks = rng.choice((0, num_blocks // 2, 2 * num_blocks))
  if get_policy(policy).swaps_to_host:
    host_blocks = host_blocks or num_blocks
  # Several with answers that grow are what makes running ones give way, or run
  # somewhere else.
  is_crowded = policy == "migrate" or (
    host_blocks > 0 and not has_circles and rng.random() < 0.6
  )
  lending = LendingConfig(
    policy=policy,
    spill_slots=4 if has_circles else rng.choice((1, 2, 4)),
    max_lent_blocks=rng.choice((None, None, num_blocks // 2)),
    headroom_blocks=rng.choice((0, 0, 1)),
    resend_after_s=0.3,
    heartbeat_every_s=0.1,
    lease_s=rng.choice((1.5, 2.5)),
    full_heartbeat_every=rng.choice((3, 10)),
    expire_after_s=2.0,
    plan_every_s=0.2 if has_circles else 0.5,
    freeze_s=0.5,
  )
  scheduler = SchedulerConfig(
    max_num_seqs=4,
    decode_buckets=(4,),
    prefill_buckets=(rng.choice((16, 32)),),
    prefill_rows=2,
  )
  network = NetworkFaults(
    min_delay_s=0.001,
    max_delay_s=rng.choice((0.002, 0.05, 0.3)),
    lost=rng.choice((0.02, 0.1, 0.25)),
    repeated=rng.choice((0.02, 0.2)),
    late=rng.choice((0.02, 0.1)),
    late_s=rng.choice((1.0, 4.0)),
  )
  lease_s = lending.lease_s
  return Scenario(
    num_instances=num_instances,
    num_blocks=num_blocks,
    host_blocks=host_blocks,
    lending=lending,
    network=network,
    request_every_s=rng.choice((0.2, 0.5)) / (3 if is_crowded else 1),
    most_open=(3 if is_crowded else 1) * num_instances + 2,
    long_answers=(
      rng.choice((0.6, 0.9)) if is_crowded or has_circles else 0.15
    ),
    trouble_every_s=0.4 if has_circles else rng.choice((0.15, 0.4)),
    plan_every_s=0.1 if has_circles else rng.choice((0.05, 0.2)),
    exchange_s=0.02 if has_circles else 0.1,
    crash_s=rng.choice((0.5, 2.0, 2 * lease_s)),
    partition_s=rng.choice((0.5, 2.0, 3 * lease_s)),
    clock_jump=rng.choice((0.0, 0.3)),
    payload_lost=rng.choice((0.0, 0.0, 0.1)),
    payload_repeated=rng.choice((0.0, 0.3)),
    copy_s=rng.choice((0.05, 0.5)),
    copy_lost=rng.choice((0.0, 0.3)),
    mishaps={
      mishap: probability
      for mishap, probability in _MISHAPS.items()
      if rng.random() < 0.8
    },
    stops_early=rng.choice((0.0, 0.02)),
    scheduler=dataclasses.replace(
      scheduler, async_scheduling=rng.random() < 0.5
    ),
    host_attention=host_blocks > num_blocks and rng.random() < 0.5,
  )


def with_all_troubles(scenario: Scenario) -> Scenario:
  """The same cluster where whatever can go wrong goes wrong at once.

  Instances plan ahead, borrow and have host memory.
  """
  return dataclasses.replace(
    scenario,
    lending=dataclasses.replace(scenario.lending, policy="greedy"),
    host_blocks=2 * scenario.num_blocks,
    host_attention=True,
    long_answers=0.6,
    scheduler=dataclasses.replace(scenario.scheduler, async_scheduling=True),
    stops_early=0.02,
    clock_jump=0.3,
    payload_lost=0.1,
    payload_repeated=0.3,
    copy_lost=0.3,
    mishaps=_MISHAPS,
  )
