"""What every kernel assumes of an rBlock pool, checked on shapes alone.

A pool is one array `[N, L, 2, K, P, D]`: `N` rBlocks, each contiguous over its
`L` layers, keys before values, `K` KV heads of `P` tokens of `D` numbers.

Numbers of 8 bits may be held as uint8, the bits of float8_e4m3fn: XLA for CPUs
updates arrays of float8 as float16, all of their elements for a single one, and
collectives and transfers of bytes work everywhere. On GPUs the one is the other
at no cost.
"""

import numbers

import jax
import jax.numpy as jnp
from jax import lax

NULL_BLOCK_ID = 0
"""rBlock 0 of every pool: padding points there, and it holds no KV."""

BLOCK_SIZE_MULTIPLE = 8
"""Tokens per rBlock are a multiple of this, as the tiles of kernels are."""

Layer = int | jax.Array
"""A layer of a pool: an int, or a traced `[]` integer."""


def require(holds: bool, name: str, rule: str, value: object) -> None:
  """Raises ValueError "`name` must be `rule`; got `value`." unless it holds."""
  if not holds:
    raise ValueError(f"{name} must be {rule}; got {value}.")


def require_shape(
  name: str, x: jax.Array, letters: str, shape: tuple[int, ...]
) -> None:
  """Raises ValueError unless `x` has the shape that the letters name.

  Args:
    name: The argument.
    x: Its value.
    letters: The shape as documented, such as `"[T, H, D]"`.
    shape: What the letters stand for in this call.
  """
  require(x.shape == shape, name, f"{letters} = {list(shape)}", list(x.shape))


def require_int32(name: str, x: jax.Array) -> None:
  """Raises ValueError unless `x` has dtype int32."""
  require(x.dtype == jnp.int32, name, "int32", x.dtype)


def require_floating(name: str, x: jax.Array) -> None:
  """Raises ValueError unless `x` has a floating-point dtype."""
  require(
    jnp.issubdtype(x.dtype, jnp.floating), name, "floating-point", x.dtype
  )


def number_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Dtype of the numbers that a pool of a dtype holds."""
  dtype = jnp.dtype(dtype)
  return jnp.dtype(jnp.float8_e4m3fn) if dtype == jnp.uint8 else dtype


def held_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Dtype of the array in which an engine keeps numbers of a dtype."""
  dtype = jnp.dtype(dtype)
  return jnp.dtype(jnp.uint8) if dtype == jnp.float8_e4m3fn else dtype


def as_numbers(kv: jax.Array) -> jax.Array:
  """What an array out of a pool means: bytes are float8_e4m3fn."""
  return _as_dtype(kv, number_dtype(kv.dtype))


def as_held(numbers: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Numbers as a pool of a dtype holds them; inverse of `as_numbers`."""
  return _as_dtype(numbers, jnp.dtype(dtype))


def _as_dtype(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def check_pool(kv_pool: jax.Array) -> None:
  """Checks the shape and dtype of a pool.

  Args:
    kv_pool: `[N, L, 2, K, P, D]` floating-point, or uint8.

  Raises:
    ValueError: If it is no such array, or `P` is a block size that kernels
      refuse.
  """
  require(
    kv_pool.ndim == 6 and kv_pool.shape[2] == 2,
    "kv_pool",
    "[N, L, 2, K, P, D]",
    list(kv_pool.shape),
  )
  require(0 not in kv_pool.shape, "kv_pool", "not empty", list(kv_pool.shape))
  require(
    kv_pool.dtype == jnp.uint8 or jnp.issubdtype(kv_pool.dtype, jnp.floating),
    "kv_pool",
    "floating-point, or uint8 for the bits of float8_e4m3fn",
    kv_pool.dtype,
  )
  block_size = kv_pool.shape[4]
  require(
    block_size % BLOCK_SIZE_MULTIPLE == 0,
    "block_size (P of kv_pool)",
    f"a positive multiple of {BLOCK_SIZE_MULTIPLE}",
    block_size,
  )


def check_scales(
  k_scale: jax.Array | None, v_scale: jax.Array | None, kv_pool: jax.Array
) -> None:
  """Checks what keys and values of a pool are multiplied by.

  Args:
    k_scale: `[K]` float32, or None.
    v_scale: `[K]` float32, or None.
    kv_pool: `[N, L, 2, K, P, D]`.

  Raises:
    ValueError: If they are no such arrays, or only one is given.
  """
  if k_scale is None and v_scale is None:
    return
  for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
    if x is None:
      raise ValueError(f"{name} must be given with the other scale; got None.")
    require_shape(name, x, "[K]", kv_pool.shape[3:4])
    require(x.dtype == jnp.float32, name, "float32", x.dtype)


def check_layer(layer: Layer, kv_pool: jax.Array) -> None:
  """Checks a layer index, its value too where that is known.

  Args:
    layer: An int, or a `[]` integer array.
    kv_pool: `[N, L, 2, K, P, D]`. The pool that it indexes.

  Raises:
    ValueError: If it is no scalar integer, or known to be out of range.
  """
  num_layers = kv_pool.shape[1]
  if isinstance(layer, numbers.Integral):
    rule = f"in [0, {num_layers}), the layers of kv_pool"
    require(0 <= layer < num_layers, "layer", rule, layer)
    return
  is_scalar = jnp.ndim(layer) == 0 and jnp.issubdtype(
    jnp.result_type(layer), jnp.integer
  )
  require(is_scalar, "layer", "an int or a [] integer array", layer)
