"""Validated configuration: frozen, hashable values that libraries may hold.

Config files (`configs/*.py`) build `ml_collections` trees at the edge; inside
the project only these dataclasses travel.
"""

import dataclasses
import difflib

from infinite_llm.cache_config import DTYPES, CacheConfig
from infinite_llm.errors import ConfigError
from infinite_llm.rules import (
  require,
  require_buckets,
  require_integer,
  require_positive,
)

MAX_GROUP_CHUNK_TOKENS = 1024
"""Query tokens of a group prefill step: they go to all that hold context."""

MAX_GROUP_ROWS = 512
"""Rows of a group decode step, over all instances."""

MAX_PROGRAM_KINDS = 24
"""Compiled programs that differ in more than the instance; more are a lot."""

_WITHOUT_LENDERS = ("static", "swap")
"""Policies under which no instance lends."""

POLICIES = ("borrow", "greedy", "migrate", "static", "swap")
"""Names of the policies; `scheduler/policies/` has them."""

_MAX_DEFAULT_HEADROOM = 4
"""At most this part of a pool, one in four, is headroom unless asked for: a
small pool would lend nothing otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LendingConfig:
  """How instances of one lending group share their pools.

  Attributes:
    policy: Name of the policy, out of `POLICIES`: "borrow" on demand, "greedy"
      moves for throughput, and to compare with, "static" (no sharing), "swap"
      (own host memory) and "migrate" (whole requests).
    performance_profile: JSON file that says how fast an instance is; only
      "greedy" needs one (`scheduler/performance_model.py`).
    spill_slots: Requests of one owner that may have rBlocks elsewhere at once.
    max_lent_blocks: Most rBlocks that an instance lends; None is no cap.
    headroom_blocks: Free rBlocks that a creditor keeps for itself. None has an
      `EngineConfig` find it: one for every sequence that may decode and those
      of a prefill chunk, but at most a quarter of the pool. A manager without
      one keeps none.
    group_prefill_buckets: Token counts that group prefill programs are compiled
      for, rising; at most 1024, since queries travel to other instances.
    group_chunk_s: Seconds that a group prefill step may take. A request's next
      chunk has as many tokens as its last one suggests, within the buckets:
      nobody waits for the whole group much longer than this.
    exchange_blocks: rBlocks that may move per pair of instances between two
      steps. A borrow of k of them takes about k / exchange_blocks steps, in
      which other rows go on; each instance stages 2 * exchange_blocks rBlocks.
    resend_after_s: Seconds without an answer after which a message is sent
      again.
    heartbeat_every_s: Seconds between heartbeats, and between renewals of
      leases.
    lease_s: Seconds of an owner's silence after which its leases end.
    full_heartbeat_every: Every so many heartbeats one says everything; the
      others say what changed.
    expire_after_s: Seconds of silence after which the gManager forgets an
      instance.
    leader_lease_s: Seconds of silence of the leading gManager after which the
      standby takes over.
    plan_every_s: Seconds between plans of the gManager.
    freeze_s: Seconds for which the instances of a circle of debts neither lend
      nor borrow, so that they can take their rBlocks home.
  """

  policy: str = "borrow"
  performance_profile: str | None = None
  spill_slots: int = 4
  max_lent_blocks: int | None = None
  headroom_blocks: int | None = None
  group_prefill_buckets: tuple[int, ...] = (128, 1024)
  group_chunk_s: float = 0.5
  exchange_blocks: int = 16
  resend_after_s: float = 0.5
  heartbeat_every_s: float = 0.1
  lease_s: float = 10.0
  full_heartbeat_every: int = 10
  expire_after_s: float = 5.0
  leader_lease_s: float = 1.0
  plan_every_s: float = 1.0
  freeze_s: float = 1.0

  def __post_init__(self):
    require(
      self.policy in POLICIES,
      "policy",
      f"one of {', '.join(POLICIES)}",
      self.policy,
    )
    require_positive(
      self, "spill_slots", "exchange_blocks", "full_heartbeat_every"
    )
    require_buckets(self, "group_prefill_buckets")
    require(
      self.group_prefill_buckets[-1] <= MAX_GROUP_CHUNK_TOKENS,
      "group_prefill_buckets[-1]",
      f"at most {MAX_GROUP_CHUNK_TOKENS}",
      self.group_prefill_buckets[-1],
    )
    for name in ("max_lent_blocks", "headroom_blocks"):
      value = getattr(self, name)
      if value is not None:
        require_integer(name, value)
        require(value >= 0, name, "None or not negative", value)
    for name in (
      "group_chunk_s",
      "resend_after_s",
      "heartbeat_every_s",
      "lease_s",
      "plan_every_s",
      "freeze_s",
    ):
      require(getattr(self, name) > 0, name, "positive", getattr(self, name))
    # One lost renewal, or one lost answer, must not end a lease.
    for name in ("resend_after_s", "heartbeat_every_s"):
      require(
        self.lease_s > 2 * getattr(self, name),
        "lease_s",
        f"more than twice {name} ({getattr(self, name)!r}), so that one lost"
        " message ends no lease",
        self.lease_s,
      )
    for name in ("expire_after_s", "leader_lease_s"):
      require(
        getattr(self, name) > 2 * self.heartbeat_every_s,
        name,
        f"more than twice heartbeat_every_s ({self.heartbeat_every_s!r}), so"
        " that one lost heartbeat is no death",
        getattr(self, name),
      )

  @property
  def has_lenders(self) -> bool:
    """Whether the policy has instances lend at all."""
    return self.policy not in _WITHOUT_LENDERS

  def reachable_blocks(self, own_blocks: int, num_instances: int) -> int:
    """rBlocks of HBM that one request could have if it were alone.

    Args:
      own_blocks: rBlocks of each instance, without the null block.
      num_instances: I, instances of the group.
    """
    if not self.has_lenders:
      return own_blocks
    lent = max(own_blocks - (self.headroom_blocks or 0), 0)
    if self.max_lent_blocks is not None:
      lent = min(lent, self.max_lent_blocks)
    return own_blocks + lent * (num_instances - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
  """Continuous batching of one instance. All shapes come from here.

  Attributes:
    max_num_seqs: Most requests that one instance runs at once.
    decode_buckets: Row counts that decode programs are compiled for, rising;
      the last one is at least `max_num_seqs`.
    prefill_buckets: Token counts that prefill programs are compiled for,
      rising; the last one is the chunk size.
    prefill_rows: Most requests in one prefill program.
    max_row_attempts: Times a row may fail its coverage, and times a request
      may be computed anew for that within a few tokens, before it fails.
  """

  max_num_seqs: int = 16
  decode_buckets: tuple[int, ...] = (1, 4, 16)
  prefill_buckets: tuple[int, ...] = (128, 1024)
  prefill_rows: int = 4
  max_row_attempts: int = 6

  def __post_init__(self):
    require_buckets(self, "decode_buckets", "prefill_buckets")
    require_positive(self, "max_num_seqs", "prefill_rows", "max_row_attempts")
    require(
      self.decode_buckets[-1] >= self.max_num_seqs,
      "decode_buckets[-1]",
      f"at least max_num_seqs ({self.max_num_seqs})",
      self.decode_buckets[-1],
    )

  @property
  def chunk_tokens(self) -> int:
    """Most prompt tokens that one program computes."""
    return self.prefill_buckets[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """One lending group of instances that serve the same model.

  Attributes:
    num_instances: Instances of the group, each with its own pool.
    tensor_parallel: Devices of each instance.
    cache: Pool of each instance.
    lending: Sharing between pools.
    scheduler: Batching of each instance.
    dtype: Dtype of weights and activations: "float32" or "bfloat16"; "auto"
      takes the checkpoint's own, bfloat16 for one in float16.
    max_logprobs: Most likely tokens that a step can report.
    seed: Seed for requests that bring none.
  """

  num_instances: int = 1
  tensor_parallel: int = 1
  cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
  lending: LendingConfig = LendingConfig()
  scheduler: SchedulerConfig = SchedulerConfig()
  dtype: str = "auto"
  max_logprobs: int = 5
  seed: int = 0

  def __post_init__(self):
    require_positive(self, "num_instances", "tensor_parallel")
    require(
      self.num_instances * self.lending.spill_slots <= MAX_GROUP_ROWS,
      "num_instances x spill_slots",
      f"at most {MAX_GROUP_ROWS}, the rows of a group step",
      self.num_instances * self.lending.spill_slots,
    )
    require(
      self.dtype in ("auto", *DTYPES),
      "dtype",
      f"one of auto, {', '.join(DTYPES)}",
      self.dtype,
    )
    require(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)
    require(
      0 <= self.max_logprobs <= 20,
      "max_logprobs",
      "in [0, 20]",
      self.max_logprobs,
    )

  def with_num_blocks(self, num_blocks: int) -> "EngineConfig":
    """The same with pools of a known size, and what follows from it.

    Args:
      num_blocks: N, rBlocks per instance with the null block.

    Returns:
      A configuration whose `num_blocks` and `headroom_blocks` are numbers.
    """
    headroom = self.lending.headroom_blocks
    if headroom is None:
      chunk_blocks = -(-self.scheduler.chunk_tokens // self.cache.block_size)
      headroom = min(
        self.scheduler.max_num_seqs + chunk_blocks,
        (num_blocks - 1) // _MAX_DEFAULT_HEADROOM,
      )
    return dataclasses.replace(
      self,
      cache=dataclasses.replace(self.cache, num_blocks=num_blocks),
      lending=dataclasses.replace(self.lending, headroom_blocks=headroom),
    )

  @property
  def has_group(self) -> bool:
    """Whether instances can lend each other rBlocks at all."""
    return self.num_instances > 1 and self.lending.has_lenders

  @property
  def num_program_kinds(self) -> int:
    """Compiled programs, instances that differ in nothing else counted once.

    Every bucket of every kind of step is one. So is each of the two ways of
    sampling for each number of rows, marking the tokens seen and writing table
    entries, and each direction between the tiers; a group has its exchange,
    coverage check and reservation epochs. A step that attends HOST consists of
    five, for one token and for many, and there is one more way to HOST.
    """
    scheduler, lending = self.scheduler, self.lending
    steps = len(scheduler.decode_buckets) + len(scheduler.prefill_buckets)
    row_counts = {*scheduler.decode_buckets, scheduler.prefill_rows}
    if self.cache.host_blocks:
      steps += 2
    if self.cache.host_attention:
      steps += 2 * 5 + 1
      row_counts.add(1)
    if self.has_group:
      steps += 1 + len(lending.group_prefill_buckets) + 3
      row_counts |= {lending.spill_slots, 1}
    return steps + 2 * len(row_counts) + 2


_PARTS: dict[str, type] = {
  "cache": CacheConfig,
  "lending": LendingConfig,
  "scheduler": SchedulerConfig,
}


def engine_config(**options: object) -> EngineConfig:
  """Builds an `EngineConfig` from flat options, whatever part they belong to.

  Args:
    **options: Fields of `EngineConfig`, `CacheConfig`, `LendingConfig` and
      `SchedulerConfig`, by name.

  Returns:
    The validated configuration.

  Raises:
    ConfigError: If an option does not exist, with the nearest that does, or
      if a value breaks its rule.
  """
  owner_of = {
    field.name: part
    for part, owner in (*_PARTS.items(), ("", EngineConfig))
    for field in dataclasses.fields(owner)
    if field.name not in _PARTS
  }
  values: dict[str, dict[str, object]] = {part: {} for part in ("", *_PARTS)}
  for name, value in options.items():
    if name not in owner_of:
      near = difflib.get_close_matches(name, owner_of, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ConfigError(f"There is no option {name!r}{hint}")
    values[owner_of[name]][name] = value
  parts = {part: owner(**values[part]) for part, owner in _PARTS.items()}
  return EngineConfig(**values[""], **parts)  # pyright: ignore[reportArgumentType]
