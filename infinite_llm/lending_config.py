"""Validated configuration of what instances lend each other."""

import dataclasses
import math

from infinite_llm.rules import (
  require,
  require_buckets,
  require_choice,
  require_flags,
  require_integer,
  require_numbers,
  require_positive,
  require_seconds,
  require_texts,
)

MAX_GROUP_CHUNK_TOKENS = 1024
"""Query tokens of a group prefill step: they go to all that hold context."""

_WITHOUT_LENDERS = ("static", "swap")
"""Policies under which no instance lends."""

POLICIES = ("borrow", "greedy", "migrate", "static", "swap")
"""Names of the policies; `scheduler/policies/` has them."""

_BEATS_PER_LEASE = 4
_MAX_LEADER_LEASE = _BEATS_PER_LEASE / (_BEATS_PER_LEASE + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LendingConfig:
  """How instances of one lending group share their pools.

  Attributes:
    policy: Name of the policy, out of `POLICIES`: "borrow" on demand, "greedy"
      moves for throughput, and to compare with, "static" (no sharing), "swap"
      (own host memory) and "migrate" (whole requests).
    performance_profile: JSON file that says how fast an instance is; only
      "greedy" needs one (`scheduler/performance_model.py`).
    bound_remote_share: Whether nobody is asked for more rBlocks than it can
      attend in the time that the borrower needs for its own, as long as there
      is room enough for that. By the profile; where there is none, by how much
      each attends. None bounds it under "greedy" only, which plans by
      such a profile.
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
    exchange_blocks: Most rBlocks that may move per pair of instances between
      two steps. A borrow of k of them takes about k / exchange_blocks steps, in
      which other rows go on; each instance stages 2 * exchange_blocks rBlocks
      at most. All that a program has room for travels, needed or not, so there
      is a small one too (`exchange_buckets`).
    resend_after_s: Seconds without an answer after which a message is sent
      again.
    heartbeat_every_s: Seconds between heartbeats, and between renewals of
      leases.
    lease_s: Seconds of an owner's silence after which its leases end.
    full_heartbeat_every: Every so many heartbeats one says everything; the
      others say what changed.
    expire_after_s: Seconds of silence after which the gManager forgets an
      instance.
    leader_lease: Silence of the leading gManager, as a part of a heartbeat
      period, after which the standby takes over. It is called, and the leader
      speaks, each `leader_beat_s`; both together fit in that period.
    plan_every_s: Seconds between plans of the gManager.
    freeze_s: Seconds for which the instances of a circle of debts neither lend
      nor borrow, so that they can take their rBlocks home.
    link_domains: Domain of each instance, from instance 0 on, by any number:
      inside one, links are fast. Empty puts all into one.
    link_between_s: Seconds that an rBlock takes between two domains.
    debtor_batch: An instance whose batch is smaller than this may be planned to
      become a debtor ("greedy").
    creditor_use: An instance of whose pool a smaller share than this is in use
      may be planned to become a creditor ("greedy").
    min_gain: A planned move must raise the throughput of the instances that it
      concerns by more than this share of it ("greedy").
    max_moves: Most moves of a plan ("greedy", "migrate").
    max_circles: Most circles of debts that a plan dissolves.
  """

  policy: str = "borrow"
  performance_profile: str | None = None
  bound_remote_share: bool | None = None
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
  leader_lease: float = 0.75
  plan_every_s: float = 1.0
  freeze_s: float = 1.0
  link_domains: tuple[int, ...] = ()
  link_between_s: float = 1.0
  debtor_batch: int = 32
  creditor_use: float = 0.8
  min_gain: float = 0.0
  max_moves: int = 1000
  max_circles: int = 1000

  def __post_init__(self):
    require_choice(self, "policy", POLICIES)
    require_texts(self, "performance_profile")
    if self.bound_remote_share is not None:
      require_flags(self, "bound_remote_share")
    require_positive(
      self,
      "spill_slots",
      "exchange_blocks",
      "full_heartbeat_every",
      "debtor_batch",
      "max_moves",
      "max_circles",
    )
    object.__setattr__(self, "link_domains", tuple(self.link_domains))
    for domain in self.link_domains:
      require_integer("link_domains[...]", domain)
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
    require_seconds(
      self,
      "group_chunk_s",
      "resend_after_s",
      "heartbeat_every_s",
      "lease_s",
      "expire_after_s",
      "plan_every_s",
      "freeze_s",
      "link_between_s",
    )
    require_numbers(self, "leader_lease", "creditor_use", "min_gain")
    require(
      0 < self.creditor_use <= 1,
      "creditor_use",
      "in (0, 1]",
      self.creditor_use,
    )
    require(
      0 <= self.min_gain < math.inf,
      "min_gain",
      "finite and not negative",
      self.min_gain,
    )
    # One lost renewal, or one lost answer, must not end a lease.
    for name in ("resend_after_s", "heartbeat_every_s"):
      require(
        self.lease_s > 2 * getattr(self, name),
        "lease_s",
        f"more than twice {name} ({getattr(self, name)!r}), so that one lost"
        " message ends no lease",
        self.lease_s,
      )
    require(
      self.freeze_s <= self.lease_s,
      "freeze_s",
      f"at most lease_s ({self.lease_s!r})",
      self.freeze_s,
    )
    require(
      self.expire_after_s > 2 * self.heartbeat_every_s,
      "expire_after_s",
      f"more than twice heartbeat_every_s ({self.heartbeat_every_s!r}), so that"
      " one lost heartbeat is no death",
      self.expire_after_s,
    )
    # With a beat on top, a standby leads within a period of a leader's death.
    require(
      0 < self.leader_lease <= _MAX_LEADER_LEASE,
      "leader_lease",
      f"in (0, {_MAX_LEADER_LEASE}]",
      self.leader_lease,
    )

  def check_pool(self, num_blocks: int) -> None:
    """Holds the cap and the headroom of lenders against the size of a pool.

    Args:
      num_blocks: rBlocks of a pool, without the null block.

    Raises:
      ConfigError: If more were to be lent than there is, or nothing ever.
    """
    cap, headroom = self.max_lent_blocks, self.headroom_blocks
    rule = f"the pool's {num_blocks} rBlocks"
    is_capped = cap is None or cap <= num_blocks
    require(is_capped, "max_lent_blocks", f"at most {rule}", cap)
    require(
      headroom is None or headroom < num_blocks or not self.has_lenders,
      "headroom_blocks",
      f"less than {rule}, or nothing is ever lent (for that there is"
      " max_lent_blocks)",
      headroom,
    )

  @property
  def bounds_remote_share(self) -> bool:
    """Whether the remote share is bounded, by the policy if nobody said."""
    if self.bound_remote_share is None:
      return self.policy == "greedy"
    return self.bound_remote_share

  @property
  def exchange_buckets(self) -> tuple[int, ...]:
    """rBlocks per pair that exchange programs are compiled for, rising."""
    return tuple(sorted({1, self.exchange_blocks}))

  @property
  def leader_lease_s(self) -> float:
    """Seconds of the leading gManager's silence that the standby bears."""
    return self.leader_lease * self.heartbeat_every_s

  @property
  def leader_beat_s(self) -> float:
    """Seconds between words of the leading gManager to the standby.

    Three of them may be lost. Each gManager must be called as often.
    """
    return self.leader_lease_s / _BEATS_PER_LEASE

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
