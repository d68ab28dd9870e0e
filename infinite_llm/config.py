"""Validated configuration: frozen, hashable values that libraries may hold.

Config files (`configs/*.py`) build `ml_collections` trees at the edge; inside
the project only these dataclasses travel.
"""

import dataclasses
import difflib

from infinite_llm.cache_config import DTYPES, CacheConfig
from infinite_llm.errors import ConfigError
from infinite_llm.lending_config import LendingConfig
from infinite_llm.rules import (
  require,
  require_buckets,
  require_choice,
  require_flags,
  require_integer,
  require_positive,
)

LOAD_FORMATS = ("auto", "dummy")
"""Where weights come from: a checkpoint, or nowhere."""

MAX_GROUP_ROWS = 512
"""Rows with rBlocks elsewhere of a group step, over all instances."""

MAX_PROGRAM_KINDS = 28
"""Compiled programs of whole models that differ in more than the instance; more
are a lot."""

_MAX_DEFAULT_HEADROOM = 4
"""At most this part of a pool, one in four, is headroom unless asked for: a
small pool would lend nothing otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
  """Continuous batching of one instance. All shapes come from here.

  Attributes:
    max_num_seqs: Most requests that one instance runs at once.
    decode_buckets: Row counts that decode programs are compiled for, rising;
      the last one is at least `max_num_seqs`, and what a group step has.
    prefill_buckets: Token counts that prefill programs are compiled for,
      rising; the last one is the chunk size.
    prefill_rows: Most requests in one prefill program.
    async_scheduling: Whether a step is planned and launched while the one
      before still runs, with the tokens that it will give: then devices do not
      wait for the host. A request that ends unforeseen has had a row too much.
    max_row_attempts: Times a row may fail its coverage, and times a request
      may be computed anew for that within a few tokens, before it fails.
  """

  max_num_seqs: int = 16
  decode_buckets: tuple[int, ...] = (1, 4, 16)
  prefill_buckets: tuple[int, ...] = (128, 1024)
  prefill_rows: int = 4
  async_scheduling: bool = True
  max_row_attempts: int = 6

  def __post_init__(self):
    require_buckets(self, "decode_buckets", "prefill_buckets")
    require_positive(self, "max_num_seqs", "prefill_rows", "max_row_attempts")
    require_flags(self, "async_scheduling")
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
    load_format: Where weights come from: "auto" reads the checkpoint, "dummy"
      draws them for the shape that its `config.json` describes, by `seed`.
    max_logprobs: Most likely tokens that a step can report.
    seed: Seed for requests that bring none, and of drawn weights.
  """

  num_instances: int = 1
  tensor_parallel: int = 1
  cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
  lending: LendingConfig = dataclasses.field(default_factory=LendingConfig)
  scheduler: SchedulerConfig = SchedulerConfig()
  dtype: str = "auto"
  load_format: str = "auto"
  max_logprobs: int = 5
  seed: int = 0

  def __post_init__(self):
    for name, part in _PARTS.items():
      value = getattr(self, name)
      require(isinstance(value, part), name, f"a {part.__name__}", value)
    require_positive(self, "num_instances", "tensor_parallel")
    require(
      self.num_instances * self.lending.spill_slots <= MAX_GROUP_ROWS,
      "num_instances x spill_slots",
      f"at most {MAX_GROUP_ROWS}, the rows with rBlocks elsewhere",
      self.num_instances * self.lending.spill_slots,
    )
    if self.has_group and self.cache.num_blocks is not None:
      self.lending.check_pool(self.cache.num_blocks - 1)
    require_choice(self, "dtype", ("auto", *DTYPES))
    require_choice(self, "load_format", LOAD_FORMATS)
    require_integer("seed", self.seed)
    require(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)
    count = self.max_logprobs
    require_integer("max_logprobs", count)
    require(0 <= count <= 20, "max_logprobs", "in [0, 20]", count)

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
    """Compiled programs, as many as are not alike.

    Alike are those that differ only in their instance, or in the shift by which
    rBlocks travel. Every bucket of every kind of step is one. So is each of the
    three kinds of sampling for each number of rows, marking the tokens seen and
    writing table entries, and each direction between the tiers; a group has
    every bucket of its exchange, its coverage check and reservation epochs.
    With `num_layered_kinds` there is one more way to HOST, and steps have one
    row; if moves are verified, what comes back is summed by one more.
    """
    scheduler, lending = self.scheduler, self.lending
    steps = len(scheduler.decode_buckets) + len(scheduler.prefill_buckets)
    row_counts = {*scheduler.decode_buckets, scheduler.prefill_rows}
    if self.cache.host_blocks:
      steps += 2
    if self.cache.host_attention:
      steps += self.num_layered_kinds + 1 + self.cache.verify_moves
      row_counts.add(1)
    if self.has_group:
      steps += 1 + len(lending.group_prefill_buckets)
      steps += len(lending.exchange_buckets) + 2
      row_counts.add(1)
    return steps + 3 * len(row_counts) + 2

  @property
  def num_layered_kinds(self) -> int:
    """Those among them of which steps that attend HOST consist.

    Five for one token and five for many, none of more than a layer; and one
    more each in a group.
    """
    return len(self.layered_buckets) * (5 + self.has_group)

  @property
  def layered_buckets(self) -> tuple[int, ...]:
    """Token counts that steps which attend HOST are compiled for, rising."""
    if not self.cache.host_attention:
      return ()
    return 1, self.scheduler.chunk_tokens


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
