"""Sizes and dtypes of the rBlock pools of an instance."""

import dataclasses
import math

from infinite_llm.errors import ConfigError
from infinite_llm.rules import (
  require,
  require_flags,
  require_integer,
  require_numbers,
  scales_as_tuples,
)

DTYPES = ("float32", "bfloat16")
"""What weights and activations can be."""

KV_DTYPES = (*DTYPES, "float8_e4m3fn")
"""What keys and values can be."""

_MAX_SLAB_BLOCKS = 64
"""rBlocks that go to HOST together to be attended there: a layer of an 8B
Llama-3 of them is 16 MiB. Of float8 twice as many, so that transfers are as
large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
  """The rBlock pools of each instance.

  Attributes:
    block_size: Tokens per rBlock, a multiple of 8.
    num_blocks: rBlocks per instance, the null block included. None has the
      engine find out what fits on the devices.
    memory_fraction: Part of a device's memory that may be used, if `num_blocks`
      is to be found out; the rest is a margin.
    kv_dtype: Dtype of keys and values, of `KV_DTYPES`; None takes the model's.
    kv_scales: What keys and values in float8_e4m3fn are multiplied by when they
      are read: an array `[L, 2, K]` or the `.npy` file of one. None takes those
      of the checkpoint; 1 where it has none.
    host_blocks: rBlocks of host memory per instance, the null block included;
      0 is no such pool. Preempted requests wait there if that is faster than
      to compute their KV again.
    host_link_bytes_per_s: Speed of copies between an instance and its host
      memory, each way, to tell what is faster.
    recompute_tokens_per_s: Speed of prefill where there is little to attend,
      for the same; what attention adds follows from the model's shape.
    verify_moves: Whether to compare checksums of both ends of every move:
      between instances, and between the tiers, with what is attended on its way
      from HOST. It blocks the host: for debugging.
    host_attention: Whether a request that is larger than all HBM within its
      reach keeps what nobody lends room for in its instance's host memory and
      attends it there; one such request of each instance at a time.
    host_attention_share: Part of its instance's HBM that such a request keeps
      at most; the rest is left to others.
  """

  block_size: int = 64
  num_blocks: int | None = None
  memory_fraction: float = 0.92
  kv_dtype: str | None = None
  kv_scales: str | tuple[tuple[tuple[float, ...], ...], ...] | None = None
  host_blocks: int = 0
  host_link_bytes_per_s: float = 40e9
  recompute_tokens_per_s: float = 40e3
  verify_moves: bool = False
  host_attention: bool = False
  host_attention_share: float = 0.5

  def __post_init__(self):
    require_integer("block_size", self.block_size)
    require(
      self.block_size > 0 and self.block_size % 8 == 0,
      "block_size",
      "a positive multiple of 8",
      self.block_size,
    )
    if self.num_blocks is not None:
      require_integer("num_blocks", self.num_blocks)
      require(self.num_blocks >= 2, "num_blocks", "at least 2", self.num_blocks)
    speeds = ("host_link_bytes_per_s", "recompute_tokens_per_s")
    require_numbers(self, "memory_fraction", *speeds)
    fraction = self.memory_fraction
    require(0 < fraction <= 1, "memory_fraction", "in (0, 1]", fraction)
    require(
      self.kv_dtype is None or self.kv_dtype in KV_DTYPES,
      "kv_dtype",
      f"None or one of {', '.join(KV_DTYPES)}",
      self.kv_dtype,
    )
    if self.kv_scales is not None:
      rule = "float8_e4m3fn where kv_scales are given"
      require(self.kv_dtype == "float8_e4m3fn", "kv_dtype", rule, self.kv_dtype)
      scales = scales_as_tuples("kv_scales", self.kv_scales)
      object.__setattr__(self, "kv_scales", scales)
    require_integer("host_blocks", self.host_blocks)
    is_pool = self.host_blocks == 0 or self.host_blocks >= 2
    require(is_pool, "host_blocks", "0 or at least 2", self.host_blocks)
    for name in speeds:
      value = getattr(self, name)
      require(0 < value < math.inf, name, "positive and finite", value)
    require_flags(self, "verify_moves", "host_attention")
    require(
      not self.host_attention or self.host_blocks > 0,
      "host_blocks",
      "at least 2 with host_attention, which attends rBlocks there",
      self.host_blocks,
    )
    require_numbers(self, "host_attention_share")
    share = self.host_attention_share
    require(0 < share <= 1, "host_attention_share", "in (0, 1]", share)

  @property
  def capacity_tokens(self) -> int:
    """Tokens of KV that one instance can hold.

    Raises:
      ConfigError: If `num_blocks` is yet to be found out.
    """
    return self._own_blocks * self.block_size

  @property
  def kept_blocks(self) -> int:
    """rBlocks in HBM of a request that has others in HOST; at most.

    Raises:
      ConfigError: If `num_blocks` is yet to be found out.
    """
    return max(int(self._own_blocks * self.host_attention_share), 1)

  @property
  def slab_blocks(self) -> int:
    """S: rBlocks of such a request that go to HOST together.

    Half of what it keeps at most, so that there is room for as many new ones
    when the last of them is not full.

    Raises:
      ConfigError: If `num_blocks` is yet to be found out.
    """
    most = min(
      self.max_slab_blocks, self.kept_blocks // 2, self.host_blocks - 1
    )
    return max(most, 1)

  @property
  def max_slab_blocks(self) -> int:
    """What S is, where pools are large enough."""
    is_float8 = self.kv_dtype == "float8_e4m3fn"
    return _MAX_SLAB_BLOCKS * (2 if is_float8 else 1)

  @property
  def overflow_blocks(self) -> int:
    """Most rBlocks of such a request, in both tiers; 0 if there can be none.

    Raises:
      ConfigError: If `num_blocks` is yet to be found out.
    """
    if not self.host_attention:
      return 0
    num_slabs = (self.host_blocks - 1) // self.slab_blocks
    return self.kept_blocks + num_slabs * self.slab_blocks

  @property
  def _own_blocks(self) -> int:
    if self.num_blocks is None:
      raise ConfigError("num_blocks must be known by now; got None.")
    return self.num_blocks - 1
