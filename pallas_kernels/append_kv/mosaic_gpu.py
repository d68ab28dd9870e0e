"""append_kv for Hopper GPUs, as a Mosaic GPU kernel through registers.

A thread block carries a few tokens: all their keys and values are on their way
from memory before the first is stored. The pool is a reference that the kernel
writes to, so that it is written where it is.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreted import settled
from pallas_kernels.pool_layout import Layer, as_held, as_numbers

_THREADS = 128  # Of a warpgroup.
_TOKENS = 4  # Of a thread block.
_OLD_BYTES = 8  # That JAX 0.11.2 would load of what a store replaces.
_VECTOR_BYTES = 16  # The widest access of a thread.


def append(
  kv_pool: jax.Array,
  layer: Layer,
  k: jax.Array,
  v: jax.Array,
  block_ids: jax.Array,
  offsets: jax.Array,
  *,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  interpret: Any = None,
) -> jax.Array:
  """Writes the keys and values of `T` tokens into their rBlocks.

  The contract is that of `api.append_kv`.

  Args:
    kv_pool: `[N, L, 2, K, P, D]`, `K * D` a multiple of 128; of 8 bits only
      float8_e4m3fn, or uint8 for its bits, and then of 256. Not 384 of 16
      bits, nor 768 of 8.
    layer: `[]` integer.
    k: `[T, K, D]` floating-point.
    v: `[T, K, D]` floating-point.
    block_ids: `[T]` int32.
    offsets: `[T]` int32.
    k_scale: `[K]` float32, or None.
    v_scale: `[K]` float32, or None.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `[N, L, 2, K, P, D]`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  row = math.prod(k.shape[1:])
  dtype = kv_pool.dtype
  kv_pool = as_numbers(kv_pool)
  is_narrow = kv_pool.dtype == jnp.float8_e4m3fn
  if kv_pool.dtype.itemsize not in (2, 4) and not is_narrow:
    raise NotImplementedError(
      "kv_pool: numbers of 16 or 32 bits, or float8_e4m3fn; got"
      f" {kv_pool.dtype}."
    )
  multiple = 2 * _THREADS if is_narrow else _THREADS
  if row % multiple:
    raise NotImplementedError(f"k: K * D a multiple of {multiple}; got {row}.")
  # Lowering a store looks at the old numbers too, as many a thread at a time.
  width = min(_OLD_BYTES // kv_pool.dtype.itemsize, row // _THREADS)
  if width & (width - 1):
    raise NotImplementedError(
      f"k: K * D other than {row} for a pool of {kv_pool.dtype}; got {row}."
    )
  if k.shape[0] == 0:
    return as_held(kv_pool, dtype)
  kv_pool = _append(
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    k,
    v,
    block_ids,
    offsets,
    None if k_scale is None else (k_scale, v_scale),
    interpret=interpret,
  )
  return as_held(settled(kv_pool, interpret), dtype)


@functools.partial(jax.jit, static_argnames="interpret")
def _append(
  kv_pool: jax.Array,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array,
  block_ids: jax.Array,
  offsets: jax.Array,
  scales: tuple[jax.Array, jax.Array] | None,
  *,
  interpret: Any,
) -> jax.Array:
  """Jitted so that the layers of a model share one trace."""
  num_tokens, *row = k.shape
  pool = jax.new_ref(kv_pool)
  sizes = [x.dtype.itemsize for x in (k, v, kv_pool)]
  widest = _VECTOR_BYTES // max(sizes)
  layout = plgpu.Layout.WG_STRIDED(
    tuple(row), vec_size=math.gcd(math.prod(row) // _THREADS, widest)
  )
  # As many as numbers of a token, so that each thread finds its own.
  divisors = [
    jnp.broadcast_to(scale[:, None], tuple(row)) for scale in scales or ()
  ]
  plgpu.kernel(
    functools.partial(_run, layout=layout),
    out_type=(),
    grid=(-(-num_tokens // _TOKENS),),
    grid_names=("block",),
    kernel_name="append_kv",
    compiler_params=plgpu.CompilerParams(
      # Threads share nothing.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    interpret=interpret,
  )(layer[None], block_ids, offsets, k, v, *divisors, pool)
  return jax.freeze(pool)


def _run(
  layer: Any,
  block_ids: Any,
  offsets: Any,
  k: Any,
  v: Any,
  *divisors_and_pool: Any,
  layout: Any,
) -> None:
  """Carries the tokens of one thread block."""
  *divisors, pool = divisors_and_pool
  load = functools.partial(plgpu.load, layout=layout, optimized=False)
  divisors = [load(x) for x in divisors]
  num_tokens = k.shape[0]
  first = lax.axis_index("block") * _TOKENS
  tokens = []
  for i in range(_TOKENS):
    token = jnp.minimum(first + i, num_tokens - 1)
    kv = [load(x.at[token]) for x in (k, v)]
    block_id = block_ids[token]
    is_held = (block_id >= 0) & (block_id < pool.shape[0])
    is_held &= first + i < num_tokens
    tokens.append((kv, is_held, block_id, offsets[token]))
  for kv, is_held, block_id, offset in tokens:

    @pl.when(is_held)
    def _(kv=kv, block_id=block_id, offset=offset):
      for i, x in enumerate(kv):
        divisor = divisors[i] if divisors else None
        x = _convert(x, divisor, pool.dtype)
        pool[block_id, layer[0], i, :, offset, :] = x


def _convert(x: jax.Array, divisor: jax.Array | None, dtype: Any) -> jax.Array:
  """What the pool gets for numbers `[K, D]`."""
  if divisor is not None:
    x = x.astype(jnp.float32) / divisor
  if jnp.dtype(dtype).itemsize == 1:  # Casts may give NaN, not the largest.
    largest = float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    x = jnp.minimum(jnp.maximum(x, -largest), largest)
  return x.astype(dtype)
