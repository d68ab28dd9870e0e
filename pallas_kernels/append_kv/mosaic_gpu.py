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

from pallas_kernels.pool_layout import Layer

_THREADS = 128  # Of a warpgroup.
_TOKENS = 4  # Of a thread block.
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
    kv_pool: `[N, L, 2, K, P, D]` of 16 or 32 bits, `K * D` a multiple of 128.
    layer: `[]` integer.
    k: `[T, K, D]` floating-point.
    v: `[T, K, D]` floating-point.
    block_ids: `[T]` int32.
    offsets: `[T]` int32.
    k_scale: None: pools of 8 bits are not covered.
    v_scale: None.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `[N, L, 2, K, P, D]`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
    if x is not None:
      raise NotImplementedError(f"{name}: None; got an array.")
  row = math.prod(k.shape[1:])
  if kv_pool.dtype.itemsize not in (2, 4):
    raise NotImplementedError(
      f"kv_pool: 16 or 32 bits a number; got {kv_pool.dtype}."
    )
  if row % _THREADS:
    raise NotImplementedError(f"k: K * D a multiple of {_THREADS}; got {row}.")
  if k.shape[0] == 0:
    return kv_pool
  return _append(
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    k,
    v,
    block_ids,
    offsets,
    interpret=interpret,
  )


@functools.partial(jax.jit, static_argnames="interpret")
def _append(
  kv_pool: jax.Array,
  layer: jax.Array,
  k: jax.Array,
  v: jax.Array,
  block_ids: jax.Array,
  offsets: jax.Array,
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
  )(layer[None], block_ids, offsets, k, v, pool)
  return jax.freeze(pool)


def _run(
  layer: Any,
  block_ids: Any,
  offsets: Any,
  k: Any,
  v: Any,
  pool: Any,
  *,
  layout: Any,
) -> None:
  """Carries the tokens of one thread block."""
  num_tokens = k.shape[0]
  first = lax.axis_index("block") * _TOKENS
  tokens = []
  for i in range(_TOKENS):
    token = jnp.minimum(first + i, num_tokens - 1)
    kv = tuple(
      plgpu.load(x.at[token], layout=layout, optimized=False) for x in (k, v)
    )
    block_id = block_ids[token]
    is_held = (block_id >= 0) & (block_id < pool.shape[0])
    is_held &= first + i < num_tokens
    tokens.append((kv, is_held, block_id, offsets[token]))
  for kv, is_held, block_id, offset in tokens:

    @pl.when(is_held)
    def _(kv=kv, block_id=block_id, offset=offset):
      for i, x in enumerate(kv):
        pool[block_id, layer[0], i, :, offset, :] = x.astype(pool.dtype)
