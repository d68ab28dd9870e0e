"""What a thread block of the prefill kernel works on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention.prefill_geometry import Geometry
from pallas_kernels.micro_attention.prefill_plan import Segments
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_NOWHERE = 2**31 - 1024  # A position that no query sees; adding a tile is safe.


class Item(NamedTuple):
  """A piece of work: one query tile, one KV head, one split of its KV.

  Attributes:
    q_tile: Number of the query tile.
    first_row: First row that it meets.
    end_row: End of the rows that it meets.
    kv_head: KV head.
    head_of_group: Query head of the KV head, in steps of what a block shares.
    split: Which part of its KV.
  """

  q_tile: jax.Array
  first_row: jax.Array
  end_row: jax.Array
  kv_head: jax.Array
  head_of_group: jax.Array
  split: jax.Array


class Block:
  """What a thread block works on."""

  def __init__(
    self,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
    shape: Geometry,
  ):
    """Names the refs.

    Args:
      refs: Operands and results, as `_launch` passes them.
      scratch: Shared memory and barriers, by name.
      shape: The static numbers.
    """
    (
      self.q_positions,
      self.tiles,
      self.segments,
      layer,
      self.block_ids,
      self.logical_ids,
      self.q,
      self.kv_pool,
      self.out,
      self.lse,
    ) = refs
    self.shape = shape
    self.scratch = scratch
    self.warpgroup = lax.axis_index("warpgroup")
    self.layer = layer[0]
    self.worker = lax.axis_index("worker")
    self.num_workers = lax.axis_size("worker")

  def __getattr__(self, name: str) -> Any:
    try:
      return self.scratch[name]
    except KeyError:
      raise AttributeError(name) from None

  @property
  def num_items(self) -> jax.Array:
    """Items of this block."""
    num_rounds = -(-self.shape.num_items // self.num_workers)
    last = (num_rounds - 1) * self.num_workers
    in_last = last + self._place(num_rounds - 1) < self.shape.num_items
    return num_rounds - 1 + in_last.astype(jnp.int32)

  def item(self, number: jax.Array) -> Item:
    """The `number`-th item of this block.

    The KV head varies slowest: blocks that run together then read the same KV
    from the L2 cache, which saves power where power is what limits. Within a KV
    head, longest items come first, and every other round is dealt in reverse.
    """
    shape = self.shape
    rest = number * self.num_workers + self._place(number)
    rest, split = _div_rem(rest, shape.num_splits)
    rest, head_of_group = _div_rem(rest, shape.items_per_kv_head)
    kv_head, tile = _div_rem(rest, shape.num_q_tiles)
    return Item(
      *(self.tiles[tile, i] for i in range(3)), kv_head, head_of_group, split
    )

  def _place(self, number: Any) -> jax.Array:
    """Place of this block in a round of dealing."""
    is_reversed = jnp.int32(number) % 2 == 1
    return jnp.where(
      is_reversed, self.num_workers - 1 - self.worker, self.worker
    )

  def walk[Carry](
    self,
    item: Item,
    step: Callable[[Segments, jax.Array, bool, Carry], Carry],
    carry: Carry,
  ) -> Carry:
    """Applies `step(segment, kv_tile, is_masked, carry)` to each KV tile."""
    num_splits = self.shape.num_splits

    def pass_segment(row: jax.Array, carry: Carry) -> Carry:
      number = item.q_tile + row
      segment = Segments(
        *(self.segments[number, i] for i in range(len(Segments._fields)))
      )
      num_tiles = segment.end - segment.begin
      begin, end = (
        segment.begin + lax.div(num_tiles * part, num_splits)
        for part in (item.split, item.split + 1)
      )
      full_begin = jnp.clip(segment.full_begin, begin, end)
      full_end = jnp.clip(segment.full_end, full_begin, end)
      for first, last, is_masked in (
        (begin, full_begin, True),
        (full_begin, full_end, False),
        (full_end, end, True),
      ):
        carry = lax.fori_loop(
          first,
          last,
          lambda tile, carry, is_masked=is_masked: step(
            segment, tile, is_masked, carry
          ),
          carry,
        )
      return carry

    return lax.fori_loop(item.first_row, item.end_row, pass_segment, carry)

  def pieces(
    self, segment: Segments, tile: jax.Array
  ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """rBlock, first token in it, and entry of each copy of a KV tile."""
    shape = self.shape
    pieces = []
    for i in range(shape.pieces):
      if shape.block_size > shape.piece:
        entry, part = _div_rem(tile, shape.block_size // shape.piece)
      else:
        entry, part = tile * shape.pieces + i, 0
      is_held = entry < segment.num_entries
      entry = segment.first_entry + jnp.minimum(entry, segment.num_entries - 1)
      block_id = jnp.where(is_held, self.block_ids[entry], NULL_BLOCK_ID)
      pieces.append((block_id, part * shape.piece, entry))
    return pieces

  def first_positions(
    self, pieces: list[tuple[jax.Array, jax.Array, jax.Array]]
  ) -> list[jax.Array]:
    """Position of the first token of each copy."""
    return [
      jnp.where(
        block_id == NULL_BLOCK_ID,
        _NOWHERE,
        self.logical_ids[entry] * self.shape.block_size + first,
      )
      for block_id, first, entry in pieces
    ]

  def positions(
    self, first_positions: list[jax.Array], begin: int, size: int, layout: Any
  ) -> jax.Array:
    """Positions `[size]` of the tokens of a KV tile from `begin` on."""
    piece = self.shape.piece
    token = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    token += begin
    positions = token + first_positions[0]
    for i, first in enumerate(first_positions[1:], 1):
      positions = jnp.where(
        token >= i * piece, token + (first - i * piece), positions
      )
    return positions


def _div_rem(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
  return lax.div(x, jnp.int32(divisor)), lax.rem(x, jnp.int32(divisor))
