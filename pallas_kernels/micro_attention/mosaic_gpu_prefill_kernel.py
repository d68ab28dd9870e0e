"""The body of the prefill kernel: what each warpgroup does."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention.mosaic_gpu_prefill_block import (
  Block,
  Item,
)
from pallas_kernels.micro_attention.prefill_geometry import (
  LOG2_E,
  ROWS,
  Geometry,
)
from pallas_kernels.micro_attention.prefill_plan import Segments

# Below any logit, yet finite: the maximum of nothing, minus itself, is 0.
_LOWEST = -1e30
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def run(*refs: Any, shape: Geometry, **scratch: Any) -> None:
  """Computes in two warpgroups, copies in one.

  All walk over the same KV tiles in the same order.

  Args:
    *refs: Operands and results, as `mosaic_gpu_prefill` passes them.
    shape: The static numbers.
    **scratch: Shared memory and barriers, by name.
  """
  block = Block(refs, scratch, shape)

  @pl.when(block.warpgroup < 2)
  def _():
    plgpu.set_max_registers(232, action="increase")
    _compute(block)

  @pl.when(block.warpgroup == 2)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    _copy(block)


def _copy(block: Block) -> None:
  """Copies KV tiles into shared memory, as room becomes free."""
  shape, stages = block.shape, block.shape.tuning.stages

  def wait_for_room(free: Any, number: jax.Array) -> None:
    @pl.when(number >= stages)
    def _():
      plgpu.barrier_wait(free.at[lax.rem(number, stages)])

  def values_are_there(slot: jax.Array) -> None:
    for _ in range(shape.pieces):
      plgpu.barrier_arrive(block.v_full.at[slot])

  def copy_tile(
    item: Item,
    segment: Segments,
    tile: jax.Array,
    is_masked: bool,
    numbers: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, jax.Array]:
    k_number, v_number = numbers
    k_slot, v_slot = lax.rem(k_number, stages), lax.rem(v_number, stages)
    pieces = block.pieces(segment, tile)

    def start(which: int, smem: Any, slot: jax.Array, barrier: Any) -> None:
      def start_piece(i: int) -> None:
        block_id, first, _ = pieces[i]
        plgpu.copy_gmem_to_smem(
          block.kv_pool.at[
            block_id,
            block.layer,
            which,
            item.kv_head,
            pl.ds(first, shape.piece),
          ],
          smem.at[slot, pl.ds(i * shape.piece, shape.piece)],
          barrier,
        )

      _in_turns(block, len(pieces), start_piece)

    wait_for_room(block.k_free, k_number)
    start(0, block.k_smem, k_slot, block.k_full.at[k_slot])
    wait_for_room(block.v_free, v_number)
    if not is_masked:
      start(1, block.v_smem, v_slot, block.v_full.at[v_slot])
      return k_number + 1, v_number + 1

    firsts = block.first_positions(pieces)
    is_dirty = functools.reduce(
      jnp.logical_or,
      [
        (first < segment.reach_begin)
        | (first + (shape.piece - 1) > segment.reach_end)
        for first in firsts
      ],
    )

    @pl.when(jnp.logical_not(is_dirty))
    def _():
      start(1, block.v_smem, v_slot, block.v_full.at[v_slot])

    @pl.when(is_dirty)
    def _():
      start(1, block.v_smem, v_slot, block.v_raw)
      plgpu.barrier_wait(block.v_raw)
      _zero_out_of_reach(block, block.v_smem.at[v_slot], firsts, segment)
      values_are_there(v_slot)

    return k_number + 1, v_number + 1

  def copy_item(
    i: jax.Array, numbers: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    item = block.item(i)
    k_number, v_number = numbers
    # Values are multiplied one step after their keys; in the first step, zeros.
    slot = lax.rem(v_number, stages)
    wait_for_room(block.v_free, v_number)
    _write_zeros(block, block.v_smem.at[slot])
    values_are_there(slot)
    return block.walk(
      item, functools.partial(copy_tile, item), (k_number, v_number + 1)
    )

  zero = jnp.int32(0)
  numbers = lax.fori_loop(0, block.num_items, copy_item, (zero, zero))
  # Nobody reuses what was freed last.
  for free, count in zip((block.k_free, block.v_free), numbers, strict=True):

    def drain(number: jax.Array, _: None, free: Any = free) -> None:
      plgpu.barrier_wait(free.at[lax.rem(number, stages)])

    lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)


def _in_turns(block: Block, count: int, start: Callable[[int], None]) -> None:
  """Starts copies; where they are many, each warp starts some of them.

  A warpgroup arrives with all its threads for each copy that it starts. A warp
  arrives with fewer, but only pays if several have work.
  """
  if count <= 2 or block.shape.tuning.is_interpretable:
    for i in range(count):
      start(i)
    return

  @plgpu.warp_map
  def _(warp: jax.Array) -> None:
    for i in range(count):
      pl.when(warp == i % 4)(functools.partial(start, i))


def _patches(block: Block) -> list[tuple[int, Any]]:
  """First token and index of each 64 x 64 part of a tile of values."""
  return [
    (row, (pl.ds(row, 64), pl.ds(column, 64)))
    for row in range(0, block.shape.tuning.kv_tile, 64)
    for column in range(0, block.shape.head_dim, 64)
  ]


def _write_zeros(block: Block, values: Any) -> None:
  zeros = plgpu.layout_cast(
    jnp.zeros((64, 64), values.dtype), plgpu.Layout.WGMMA
  )
  for _, index in _patches(block):
    values[index] = zeros
  plgpu.commit_smem()


def _zero_out_of_reach(
  block: Block,
  values: Any,
  first_positions: list[jax.Array],
  segment: Segments,
) -> None:
  """Overwrites values that may be NaN, which a weight of 0 does not cancel."""
  for row, index in _patches(block):
    x = plgpu.load(values.at[index], layout=plgpu.Layout.WGMMA)
    positions = block.positions(first_positions, row, 64, _BY_ROW)
    positions = lax.broadcast_in_dim(positions, x.shape, [0])
    in_reach = (positions >= segment.reach_begin) & (
      positions <= segment.reach_end
    )
    values[index] = jnp.where(in_reach, x, jnp.zeros_like(x))
  plgpu.commit_smem()


def _compute(block: Block) -> None:
  """Attends to the KV of each item in turn."""
  me = block.warpgroup

  _load_queries(block, block.item(0))

  @pl.when(me == 1)
  def _():
    plgpu.barrier_arrive(block.turn.at[0])

  lax.fori_loop(
    0,
    block.num_items,
    functools.partial(_compute_item, block),
    jnp.int32(0),
  )

  @pl.when(me == 0)
  def _():
    plgpu.barrier_wait(block.turn.at[0])


def _place_of_rows(block: Block, item: Item) -> tuple[jax.Array, jax.Array]:
  """First query token and query head of this warpgroup's rows."""
  shape, me = block.shape, block.warpgroup
  if shape.heads_per_block == 2:
    token, head = item.q_tile * ROWS, item.head_of_group * 2 + me
  else:
    token, head = (item.q_tile * 2 + me) * ROWS, item.head_of_group
  group = shape.num_q_heads // shape.num_kv_heads
  return token, item.kv_head * group + head


def _load_queries(block: Block, item: Item) -> None:
  token, head = _place_of_rows(block, item)
  plgpu.copy_gmem_to_smem(
    block.q.at[pl.ds(token, ROWS), head],
    block.q_smem.at[block.warpgroup],
    block.q_full.at[block.warpgroup],
  )


def _compute_item(block: Block, i: jax.Array, number: jax.Array) -> jax.Array:
  """Attends 64 rows to the KV tiles of an item, and writes their state.

  Args:
    block: The thread block.
    i: Which of its items.
    number: KV tiles of the items before.

  Returns:
    KV tiles of the items so far.
  """
  shape = block.shape
  item = block.item(i)
  token, head = _place_of_rows(block, item)
  q_positions = plgpu.load(
    block.q_positions.at[pl.ds(token, ROWS)], layout=_BY_ROW, optimized=False
  )

  def logits(
    s: jax.Array, segment: Segments, tile: jax.Array, is_masked: bool
  ) -> jax.Array:
    if shape.logit_soft_cap is not None:
      # tanh(x) = 1 - 2 / (exp(2 x) + 1); the device's own is too coarse.
      factor = 2 * LOG2_E * shape.scale / shape.logit_soft_cap
      s = 1.0 - 2.0 / (jnp.exp2(s * factor) + 1.0)
    if not is_masked:
      return s
    tokens = token + plgpu.broadcasted_iota(
      jnp.int32, (ROWS,), 0, layout=_BY_ROW
    )
    is_own = (tokens >= segment.first_query) & (tokens < segment.end_query)
    q = jnp.where(is_own, q_positions, -1)
    kv = block.positions(
      block.first_positions(block.pieces(segment, tile)),
      0,
      shape.tuning.kv_tile,
      _BY_COLUMN,
    )
    q = lax.broadcast_in_dim(q, s.shape, [0])
    kv = lax.broadcast_in_dim(kv, s.shape, [1])
    sees = kv <= q
    if shape.sliding_window is not None:
      sees &= q - kv < shape.sliding_window
    return jnp.where(sees, s, -jnp.inf)

  number, acc, top, total = _attend(block, item, i, number, logits)

  is_empty = (total == 0.0) | (q_positions < 0)
  inverse = jnp.where(is_empty, 0.0, 1.0 / total)
  weight = lax.broadcast_in_dim(inverse, acc.shape, [0])
  out = jnp.where(weight > 0.0, acc * weight, 0.0)
  lse = jnp.where(is_empty, -jnp.inf, top * math.log(2) + jnp.log(total))
  block.out[item.split, pl.ds(token, ROWS), head] = out
  block.lse[item.split, head, pl.ds(token, ROWS)] = lse
  return number


def _initial_sums(shape: Geometry) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted sum of values, maximum of logits to base 2, sum of weights."""

  def full(dims: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), layout)

  return (
    full((ROWS, shape.head_dim), 0.0, plgpu.Layout.WGMMA),
    full((ROWS,), _LOWEST, _BY_ROW),
    full((ROWS,), 0.0, _BY_ROW),
  )


def _weights(
  s: jax.Array, top: jax.Array, shape: Geometry
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """New maximum, decay of what was summed before, and weights `[64, KV]`."""
  scale = shape.log2_scale
  new_top = jnp.maximum(top, jnp.max(s, axis=1) * scale)
  decay = jnp.exp2(top - new_top)
  return (
    new_top,
    decay,
    jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0])),
  )


def _attend(
  block: Block,
  item: Item,
  i: jax.Array,
  number: jax.Array,
  logits: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Sums over the KV tiles of an item; values are multiplied one step late.

  A warpgroup issues both products of a step in one turn, and computes the
  weights of the new logits while the old weights still multiply values.

  Args:
    block: The thread block.
    item: The item.
    i: Its number in this block.
    number: KV tiles of the items before.
    logits: `logits(products, segment, kv_tile, is_masked)`.

  Returns:
    KV tiles so far; `[64, D]` weighted sum of values, `[64]` maximum of the
    logits to base 2, and `[64]` sum of weights.
  """
  shape, tuning, me = block.shape, block.shape.tuning, block.warpgroup
  dtype = block.q_smem.dtype

  def multiply_values(acc_ref: Any, acc: jax.Array, p: Any, slot: Any) -> None:
    if tuning.is_interpretable:
      plgpu.wgmma(acc_ref, block.p_smem.at[me], block.v_smem.at[slot])
    else:
      acc_ref[...] = acc
      plgpu.wgmma(acc_ref, p, block.v_smem.at[slot])

  def read(acc_ref: Any, acc: jax.Array) -> jax.Array:
    return acc + acc_ref[...] if tuning.is_interpretable else acc_ref[...]

  def keep(p: jax.Array) -> None:
    if tuning.is_interpretable:
      block.p_smem.at[me][...] = p
      plgpu.commit_smem()

  def step(
    segment: Segments, tile: jax.Array, is_masked: bool, carry: Any
  ) -> Any:
    number, acc, top, total, p = carry
    # Each item so far had a tile of zeros among its values.
    slot = lax.rem(number, tuning.stages)
    v_slot = lax.rem(number + i, tuning.stages)
    plgpu.barrier_wait(block.k_full.at[slot])
    plgpu.barrier_wait(block.v_full.at[v_slot])
    plgpu.barrier_wait(block.turn.at[me])

    def multiply(s_ref: Any, acc_ref: Any) -> Any:
      keys = block.k_smem.at[slot].transpose((1, 0))
      plgpu.wgmma(s_ref, block.q_smem.at[me], keys)
      multiply_values(acc_ref, acc, p, v_slot)
      plgpu.barrier_arrive(block.turn.at[1 - me])
      s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
      plgpu.barrier_arrive(block.k_free.at[slot])
      s = logits(s, segment, tile, is_masked)
      new_top, decay, weights = _weights(s, top, shape)
      new_total = total * decay + jnp.sum(weights, axis=1)
      new_acc = read(acc_ref, acc)
      plgpu.barrier_arrive(block.v_free.at[v_slot])
      new_acc *= lax.broadcast_in_dim(decay, new_acc.shape, [0])
      new_p = weights.astype(dtype)
      keep(new_p)
      return new_acc, new_top, new_total, new_p

    return number + 1, *pl.run_scoped(
      multiply,
      plgpu.ACC((ROWS, tuning.kv_tile), jnp.float32),
      plgpu.ACC(acc.shape, jnp.float32),
    )

  p = plgpu.layout_cast(
    jnp.zeros((ROWS, tuning.kv_tile), dtype), plgpu.Layout.WGMMA
  )
  keep(p)
  plgpu.barrier_wait(block.q_full.at[me])
  number, acc, top, total, p = block.walk(
    item, step, (number, *_initial_sums(shape), p)
  )

  @pl.when(i + 1 < block.num_items)
  def _():
    _load_queries(block, block.item(i + 1))

  v_slot = lax.rem(number + i, tuning.stages)
  plgpu.barrier_wait(block.v_full.at[v_slot])

  def multiply_last(acc_ref: Any) -> jax.Array:
    multiply_values(acc_ref, acc, p, v_slot)
    return read(acc_ref, acc)

  acc = pl.run_scoped(multiply_last, plgpu.ACC(acc.shape, jnp.float32))
  plgpu.barrier_arrive(block.v_free.at[v_slot])
  return number, acc, top, total
