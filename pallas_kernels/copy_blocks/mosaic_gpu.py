"""copy_blocks for Hopper GPUs, as Mosaic GPU kernels through registers.

An rBlock is one run of memory. A thread block carries a small piece of one: all
of it is on its way from memory before the first of it is stored.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # Of a warpgroup.
_VECTOR_BYTES = 16  # The widest access of a thread.
_VECTORS = 8  # Of a thread.


@functools.partial(jax.jit, static_argnames="interpret")
def pack(
  kv_pool: jax.Array, block_ids: jax.Array, *, interpret: Any = None
) -> jax.Array:
  """Copies rBlocks out; the contract is that of `api.pack_blocks`.

  Args:
    kv_pool: `[N, L, 2, K, P, D]`, whose rBlocks are whole multiples of 2 KiB.
    block_ids: `[Q]` int32.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `[Q, L, 2, K, P, D]`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  pieces = _in_pieces(kv_pool)
  (count,) = block_ids.shape
  if count == 0:
    return kv_pool[:0]

  def run(block_ids: Any, source: Any, out: Any) -> None:
    i, piece = lax.axis_index("block"), lax.axis_index("piece")
    block_id = jnp.clip(block_ids[i], 0, source.shape[0] - 1)
    out[i, piece] = _load(source.at[block_id, piece])

  out = _kernel(
    run,
    (count, pieces.shape[1]),
    interpret,
    out_type=jax.ShapeDtypeStruct((count, *pieces.shape[1:]), pieces.dtype),
    kernel_name="pack_blocks",
  )(block_ids, pieces)
  return out.reshape(count, *kv_pool.shape[1:])


@functools.partial(jax.jit, static_argnames="interpret")
def unpack(
  kv_pool: jax.Array,
  blocks: jax.Array,
  block_ids: jax.Array,
  valid: jax.Array,
  *,
  interpret: Any = None,
) -> jax.Array:
  """Copies rBlocks in; the contract is that of `api.unpack_blocks`.

  Args:
    kv_pool: `[N, L, 2, K, P, D]`, whose rBlocks are whole multiples of 2 KiB.
    blocks: `[Q, L, 2, K, P, D]`.
    block_ids: `[Q]` int32.
    valid: `[Q]` bool.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `[N, L, 2, K, P, D]`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  pool, pieces = jax.new_ref(_in_pieces(kv_pool)), _in_pieces(blocks)
  if blocks.shape[0] == 0:
    return kv_pool

  def run(block_ids: Any, source: Any, pool: Any) -> None:
    i, piece = lax.axis_index("block"), lax.axis_index("piece")
    block_id = block_ids[i]

    @pl.when((block_id >= 0) & (block_id < pool.shape[0]))
    def _():
      pool[block_id, piece] = _load(source.at[i, piece])

  _kernel(
    run,
    pieces.shape[:2],
    interpret,
    out_type=(),
    kernel_name="unpack_blocks",
  )(jnp.where(valid, block_ids, -1), pieces, pool)
  return jax.freeze(pool).reshape(kv_pool.shape)


def _in_pieces(blocks: jax.Array) -> jax.Array:
  """The same memory as `[Q, pieces, numbers of a piece]`."""
  size = math.prod(blocks.shape[1:])
  vector = _VECTOR_BYTES // blocks.dtype.itemsize
  piece = math.gcd(size, _THREADS * vector * _VECTORS)
  if piece % (_THREADS * vector):
    raise NotImplementedError(
      f"kv_pool: rBlocks in multiples of {_THREADS * _VECTOR_BYTES} bytes; got"
      f" {size * blocks.dtype.itemsize}."
    )
  return blocks.reshape(-1, size // piece, piece)


def _load(piece: Any) -> jax.Array:
  vector = _VECTOR_BYTES // piece.dtype.itemsize
  layout = plgpu.Layout.WG_STRIDED(piece.shape, vec_size=vector)
  return plgpu.load(piece, layout=layout, optimized=False)


def _kernel(
  run: Any, grid: tuple[int, int], interpret: Any, **options: Any
) -> Any:
  return plgpu.kernel(
    run,
    grid=grid,
    grid_names=("block", "piece"),
    compiler_params=plgpu.CompilerParams(
      # Threads share nothing.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    interpret=interpret,
    **options,
  )
