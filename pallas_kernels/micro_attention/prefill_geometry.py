"""How the prefill kernel is cut: what is tuned, and what a call gives."""

import dataclasses
import math

ROWS = 64  # Of a warpgroup: the M of one wgmma.
LOG2_E = math.log2(math.e)
NUM_SMS = 132  # Of an H100 or H200.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
  """How the kernel is cut.

  Attributes:
    kv_tile: KV tokens per step.
    stages: KV tiles in flight.
    num_workers: Thread blocks, among which the work is dealt out; None is one
      for each item, so that the hardware deals.
    is_interpretable: Whether weights go through shared memory and sums through
      registers, which is slower, and is what interpret mode can do.
  """

  kv_tile: int
  stages: int
  num_workers: int | None = None
  is_interpretable: bool = False

  def __post_init__(self):
    if self.kv_tile % 64 or not 64 <= self.kv_tile <= 256:
      raise ValueError(
        f"kv_tile must be a multiple of 64 up to 256; got {self.kv_tile}."
      )
    if self.num_workers is not None and self.num_workers < 1:
      raise ValueError(f"num_workers must be positive; got {self.num_workers}.")
    if self.stages < 2:
      raise ValueError(f"stages must be at least 2; got {self.stages}.")


def default_tuning(head_dim: int, block_size: int) -> Tuning:
  """The shipped tuning: as wide a KV tile as registers and rBlocks allow.

  Args:
    head_dim: `D`, of 64, 128 or 256.
    block_size: `P`.

  Returns:
    The tuning.
  """
  kv_tile = {64: 192, 128: 128, 256: 64}[head_dim]
  # A tile of part of an rBlock and a whole one could not be copied.
  if kv_tile > block_size and kv_tile % block_size:
    kv_tile = block_size
  return Tuning(kv_tile=kv_tile, stages=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """The static numbers of one call.

  Attributes:
    num_q_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    block_size: `P`.
    num_q_tiles: Tiles that the query tokens are cut into.
    num_splits: Parts that the KV of each tile is cut into.
    scale: Multiplier on the logits.
    sliding_window: How many positions a query sees; None is all.
    logit_soft_cap: Soft cap on the logits; None is none.
    tuning: How the kernel is cut.
  """

  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  block_size: int
  num_q_tiles: int
  num_splits: int
  scale: float
  sliding_window: int | None
  logit_soft_cap: float | None
  tuning: Tuning

  @property
  def heads_per_block(self) -> int:
    """Query heads that the two warpgroups share out."""
    return heads_per_block(self.num_q_heads // self.num_kv_heads)

  @property
  def q_tile(self) -> int:
    """Query tokens of a thread block."""
    return 2 * ROWS // self.heads_per_block

  @property
  def items_per_kv_head(self) -> int:
    """Items that read one KV head for one query tile, of one split."""
    return self.num_q_heads // self.num_kv_heads // self.heads_per_block

  @property
  def num_items(self) -> int:
    """Pieces of work for thread blocks."""
    return (
      self.num_q_tiles
      * self.num_kv_heads
      * self.items_per_kv_head
      * self.num_splits
    )

  @property
  def piece(self) -> int:
    """KV tokens per copy: an rBlock, or what a tile has of one."""
    return min(self.tuning.kv_tile, self.block_size)

  @property
  def pieces(self) -> int:
    """Copies per KV tile."""
    return self.tuning.kv_tile // self.piece

  @property
  def log2_scale(self) -> float:
    """Multiplier on dot products, or on capped logits, to base 2."""
    if self.logit_soft_cap is None:
      return self.scale * LOG2_E
    return self.logit_soft_cap * LOG2_E


def heads_per_block(group: int) -> int:
  """Query heads that two warpgroups share, of so many to a KV head."""
  return 1 if group % 2 else 2
