"""The static side of one call of the decode kernel: sizes and tuning."""

import dataclasses
from typing import Any

MULTIPROCESSORS = 132
"""Of the GPUs that the kernel is for."""

REDUCTION_NUMBERS = 512
"""Of 4 bytes, that a warpgroup's reduction over its warps may exchange."""

_SHARED_MEMORY_BYTES = 224 * 1024  # Of a block, less barriers and scratch.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
  """How the kernel is laid out on the device.

  Attributes:
    tile_tokens: KV tokens of one tile: 64 or 128.
    num_stages: Tiles in the ring that copies fill.
    num_wide_v: Tiles in the ring of widened values, where the pool's dtype is
      narrower than the queries'. It and `num_stages` must then be even.
    num_workers: Blocks of threads; one per multiprocessor.
  """

  tile_tokens: int = 128
  num_stages: int = 3
  num_wide_v: int = 2
  num_workers: int = MULTIPROCESSORS

  def __post_init__(self):
    if self.tile_tokens not in (64, 128):
      raise ValueError(
        f"tile_tokens must be 64 or 128; got {self.tile_tokens}."
      )
    if self.num_stages < 2:
      raise ValueError(f"num_stages must be at least 2; got {self.num_stages}.")
    if self.num_wide_v < 1:
      raise ValueError(f"num_wide_v must be at least 1; got {self.num_wide_v}.")
    if self.num_workers < 1:
      raise ValueError(
        f"num_workers must be at least 1; got {self.num_workers}."
      )


def default_tuning(
  head_dim: int, columns: int, *, is_narrow: bool = False, num_spared: int = 0
) -> Tuning:
  """The shipped tuning: as many tiles under way as shared memory holds.

  Args:
    head_dim: `D`.
    columns: Of one item: query tokens times query heads.
    is_narrow: Whether keys and values have 8 bits instead of 16.
    num_spared: Multiprocessors that it leaves to others.

  Returns:
    The tuning.
  """
  is_small = head_dim <= 128 and columns <= (8 if is_narrow else 16)
  tile_tokens = 128 if is_small else 64
  num_workers = MULTIPROCESSORS - num_spared
  tile_bytes = 2 * 2 * head_dim * tile_tokens  # Keys and values of 16 bits.
  room = _SHARED_MEMORY_BYTES - columns * (
    2 * 2 * head_dim + 2 * tile_tokens + 4 * head_dim
  )
  if not is_narrow:
    num_stages = min(room // tile_bytes, 6)
    return Tuning(
      tile_tokens=tile_tokens, num_stages=num_stages, num_workers=num_workers
    )
  # Two tiles of values in 16 bits; the rest for 8 bits. The second attending
  # warpgroup has weights of its own, and hands its sums on.
  num_wide_v = 2
  room -= columns * (2 * tile_tokens + 4 * head_dim)
  room -= 2 * 4 * REDUCTION_NUMBERS + num_wide_v * tile_bytes // 2
  return Tuning(
    tile_tokens=tile_tokens,
    num_stages=min(room // (tile_bytes // 2), 8) // 2 * 2,
    num_wide_v=num_wide_v,
    num_workers=num_workers,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """Everything static of one call.

  Attributes:
    group: Query heads of one item: those of a KV head, or of a part of them.
    parts: Parts of the query heads of a KV head, each with items of its own.
    head_columns: Columns of one query token: copies come in whole eights of
      query heads, so that neighbours of a group may come with it.
    tokens_per_item: Query tokens that one item covers.
    chunks: Items of one row and one part, each with some of the query tokens.
    num_q_heads: `H`, with what fills up the last part of each KV head.
    num_kv_heads: `K`.
    num_layers: `L`.
    block_size: `P`.
    head_dim: `D`.
    dtype: Of queries, and of keys and values when they are multiplied.
    is_narrow: Whether the pool's dtype is narrower: float8_e4m3fn.
    scale: Multiplier on the logits.
    sliding_window: Positions that a query sees; None is all.
    soft_cap: Soft cap on the logits; None is none.
    tuning: Layout on the device.
    interpret: Whether the kernel is interpreted: blocks then run one after
      another, and there are no semaphores.
  """

  group: int
  parts: int
  head_columns: int
  tokens_per_item: int
  chunks: int
  num_q_heads: int
  num_kv_heads: int
  num_layers: int
  block_size: int
  head_dim: int
  dtype: Any
  is_narrow: bool
  scale: float
  sliding_window: int | None
  soft_cap: float | None
  tuning: Tuning
  interpret: bool

  def __post_init__(self):
    if not self.is_narrow:
      return
    for name in ("num_stages", "num_wide_v"):
      value = getattr(self.tuning, name)
      if value % 2:
        # A warpgroup that takes every second tile must see every use of the
        # slots that it waits for: barriers tell two uses apart, not four.
        raise ValueError(
          f"tuning.{name} must be even where the pool's dtype is narrower than"
          f" the queries'; got {value}."
        )

  @property
  def attenders(self) -> int:
    """Warpgroups that attend, each to every second tile if they are two."""
    return 2 if self.is_narrow else 1

  @property
  def columns(self) -> int:
    """Columns of one item."""
    return self.tokens_per_item * self.head_columns

  @property
  def items_per_row(self) -> int:
    """Items of one row: by KV head, by part, by query tokens."""
    return self.num_kv_heads * self.parts * self.chunks

  @property
  def copies(self) -> int:
    """Copies that make one tile of keys, or of values."""
    return max(1, self.tuning.tile_tokens // self.block_size)

  @property
  def copies_per_step(self) -> int:
    """Copies of keys, and of values, that are issued without a branch.

    Beside two attending warpgroups, the addresses of four or eight of each are
    more than the uniform registers hold, and spill those of all warpgroups.
    """
    return min(self.copies, 2) if self.is_narrow else self.copies

  @property
  def copy_tokens(self) -> int:
    """KV tokens of one copy."""
    return min(self.tuning.tile_tokens, self.block_size)

  @property
  def tiles_per_block(self) -> int:
    """Tiles of one rBlock, where it has several."""
    return max(1, self.block_size // self.tuning.tile_tokens)
