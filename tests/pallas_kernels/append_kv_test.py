"""append_kv writes what it is told to, where it is told to, and no more."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.append_kv import mosaic_gpu
from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.pool_layout import NULL_BLOCK_ID, as_held, as_numbers

_N, _L, _K, _P, _D = 6, 3, 2, 8, 64
_LAYER = 1
_INTERPRETED = functools.partial(
  mosaic_gpu.append, interpret=plgpu.InterpretGPUParams(detect_races=True)
)
_APPENDS = [
  pytest.param(functools.partial(append_kv, implementation="xla"), id="xla"),
  pytest.param(_INTERPRETED, id="mosaic_gpu_interpreted"),
  pytest.param(
    functools.partial(append_kv, implementation="mosaic_gpu"),
    id="mosaic_gpu",
    marks=pytest.mark.gpu,
  ),
]
_each_implementation = pytest.mark.parametrize("append", _APPENDS)


def _pool(dtype=jnp.float32) -> jax.Array:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((_N, _L, 2, _K, _P, _D)), dtype)


def _kv(num_tokens: int) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(1)
  return tuple(
    jnp.asarray(rng.standard_normal((num_tokens, _K, _D)), jnp.float32)
    for _ in range(2)
  )


def _ints(*values: int) -> jax.Array:
  return jnp.asarray(values, jnp.int32)


def _expected(pool, k, v, block_ids, offsets) -> np.ndarray:
  expected = np.array(pool)
  for t, (block, offset) in enumerate(zip(block_ids, offsets, strict=True)):
    expected[block, _LAYER, 0, :, offset] = k[t].astype(pool.dtype)
    expected[block, _LAYER, 1, :, offset] = v[t].astype(pool.dtype)
  return expected


@_each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", [_LAYER, jnp.int32(_LAYER)], ids=type)
def test_tokens_land_in_their_places(layer, dtype, append):
  pool, (k, v) = _pool(dtype), _kv(4)
  block_ids, offsets = _ints(5, 5, 2, 1), _ints(6, 7, 0, 3)
  result = append(pool, layer, k, v, block_ids, offsets)
  assert result.dtype == pool.dtype
  expected = _expected(pool, k, v, block_ids, offsets)
  np.testing.assert_array_equal(np.asarray(result), expected)


@_each_implementation
def test_an_8_bit_pool_takes_scaled_and_clipped_numbers(append):
  pool = jnp.zeros((_N, _L, 2, _K, _P, 2 * _D), jnp.float8_e4m3fn)
  k = jnp.broadcast_to(jnp.array([[3.0], [1e4]]), (1, _K, 2 * _D))
  v = jnp.broadcast_to(jnp.array([[-1e9], [0.3]]), (1, _K, 2 * _D))
  result = append(
    pool,
    _LAYER,
    k,
    v,
    _ints(2),
    _ints(5),
    k_scale=jnp.array([0.5, 2.0]),
    v_scale=jnp.array([1.0, 0.25]),
  )
  # 448 is the largest number, and 1.25 the nearest to 1.2.
  written = np.asarray(result[2, _LAYER, :, :, 5, 0], np.float32)
  np.testing.assert_array_equal(written, [[6.0, 448.0], [-448.0, 1.25]])


def _e4m3_numbers() -> np.ndarray:
  """All 253 finite numbers of float8_e4m3fn, rising; 0 and -0 are one."""
  bits = np.arange(256, dtype=np.uint8)
  numbers = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  return np.unique(numbers[np.isfinite(numbers)])


@_each_implementation
@pytest.mark.parametrize("held", ["float8_e4m3fn", "uint8"])
def test_rounding_to_8_bits_is_to_nearest_even_and_saturates(held, append):
  numbers = _e4m3_numbers()
  assert len(numbers) == 253
  assert numbers[-1] == 448
  # Numbers are kept, ties go to the even one, and a little beyond a tie to the
  # other one: too little for float16 to tell.
  low, high = numbers[:-1], numbers[1:]
  tie = (low + high) / 2
  above, below = (np.nextafter(tie, x) for x in (high, low))
  even = np.arange(len(low)) % 2 == 0  # -448 is even, and they alternate.
  beyond = np.float32([448.1, 464, 1e5, 3e38, np.inf])
  given = np.concatenate([numbers, tie, above, below, beyond, -beyond])
  right = np.concatenate(
    [numbers, np.where(even, low, high), high, low, [448.0] * 5, [-448.0] * 5]
  )
  width = 2 * _D
  tokens = -(-len(given) // width)
  given = np.pad(given, (0, tokens * width - len(given)))
  right = np.pad(right, (0, tokens * width - len(right)))
  k = np.repeat(given.reshape(tokens, 1, width), _K, axis=1)
  pool = jnp.zeros((_N, _L, 2, _K, _P, width), held)
  block_ids, offsets = jnp.full(tokens, 3, jnp.int32), jnp.arange(tokens)
  result = append(pool, _LAYER, k, -k, block_ids, offsets.astype(jnp.int32))
  assert result.dtype == held
  written = np.asarray(as_numbers(result), np.float32)[3, _LAYER, :, :, :tokens]
  for head in range(_K):
    np.testing.assert_array_equal(written[0, head].reshape(-1), right)
    np.testing.assert_array_equal(written[1, head].reshape(-1), -right)


@_each_implementation
def test_a_pool_of_bytes_gets_the_bits_of_an_8_bit_pool(append):
  rng = np.random.default_rng(3)
  k, v = jnp.asarray(100 * rng.standard_normal((2, 5, _K, 2 * _D)), "bfloat16")
  block_ids, offsets = _ints(4, 1, 1, 0, -1), _ints(0, 6, 7, 0, 0)
  scales = {"k_scale": jnp.array([0.3, 2.0]), "v_scale": jnp.array([0.1, 0.7])}
  pool = jnp.zeros((_N, _L, 2, _K, _P, 2 * _D), jnp.float8_e4m3fn)
  numbers, held = (
    append(x, _LAYER, k, v, block_ids, offsets, **scales)
    for x in (pool, as_held(pool, jnp.uint8))
  )
  np.testing.assert_array_equal(held, as_held(numbers, jnp.uint8))
  assert np.asarray(held).any()


@_each_implementation
def test_padding_changes_the_null_block_only(append):
  pool, (k, v) = _pool(), _kv(5)
  block_ids = _ints(3, *[NULL_BLOCK_ID] * 4)
  offsets = _ints(2, 0, 0, 0, 7)
  result = append(pool, _LAYER, k, v, block_ids, offsets)
  expected = _expected(pool, k[:1], v[:1], block_ids[:1], offsets[:1])
  np.testing.assert_array_equal(result[1:], expected[1:])


@_each_implementation
@pytest.mark.parametrize("block_id", [-1, _N, 2**31 - 1])
def test_ids_outside_of_the_pool_are_dropped(block_id, append):
  pool, (k, v) = _pool(), _kv(1)
  result = append(pool, _LAYER, k, v, _ints(block_id), _ints(0))
  np.testing.assert_array_equal(result, pool)


@_each_implementation
def test_no_tokens_change_nothing(append):
  pool, (k, v) = _pool(), _kv(0)
  result = append(pool, _LAYER, k, v, _ints(), _ints())
  np.testing.assert_array_equal(result, pool)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("num_tokens", [1, 512])
def test_a_donated_pool_is_written_in_place(num_tokens, dtype):
  of = jax.ShapeDtypeStruct
  pool = of((4096, 32, 2, 8, 64, 128), dtype)
  kv = of((num_tokens, 8, 128), jnp.bfloat16)
  ids = of((num_tokens,), jnp.int32)

  def append(*args):
    return append_kv(*args, implementation="xla")

  compiled = jax.jit(append, donate_argnums=0)
  compiled = compiled.lower(pool, of((), jnp.int32), kv, kv, ids, ids).compile()
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kv_pool": _pool()[0]}, r"kv_pool must be \[N, L, 2, K, P, D\]"),
    (
      {"kv_pool": _pool(jnp.int8)},
      r"kv_pool must be floating-point, or uint8 for .*; got int8\.",
    ),
    ({"layer": _L}, r"layer must be in \[0, 3\), .*; got 3"),
    ({"k": _kv(3)[0][0]}, r"k must be \[T, K, D\]; got \[2, 64\]"),
    ({"k": _kv(3)[0][:, :1]}, r"k must be \[T, K, D\] = \[3, 2, 64\]; got"),
    ({"v": _kv(2)[1]}, r"v must be \[T, K, D\] = \[3, 2, 64\]; got"),
    ({"v": _kv(3)[1].astype(int)}, "v must be floating-point; got int32"),
    ({"block_ids": _ints(1)}, r"block_ids must be \[T\] = \[3\]; got \[1\]"),
    ({"offsets": jnp.zeros(3)}, "offsets must be int32; got float32"),
    ({"implementation": "cuda"}, "one of mosaic_gpu, xla; got 'cuda'"),
  ],
)
def test_a_wrong_call_names_argument_rule_and_value(changes, message):
  k, v = _kv(3)
  arguments = {
    "kv_pool": _pool(),
    "layer": 0,
    "k": k,
    "v": v,
    "block_ids": _ints(1, 2, 3),
    "offsets": _ints(0, 0, 0),
  }
  with pytest.raises(ValueError, match=message):
    append_kv(**(arguments | changes))


@_each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_8_bit_pool_needs_no_scales(dtype, append):
  pool = jnp.zeros((_N, _L, 2, _K, _P, 2 * _D), jnp.float8_e4m3fn)
  rng = np.random.default_rng(2)
  k, v = jnp.asarray(rng.standard_normal((2, 3, _K, 2 * _D)), dtype)
  block_ids, offsets = _ints(4, 1, 1), _ints(0, 6, 7)
  result = append(pool, _LAYER, k, v, block_ids, offsets)
  expected = _expected(pool, k, v, block_ids, offsets)
  np.testing.assert_array_equal(np.asarray(result), expected)


@pytest.mark.parametrize(
  ("dtype", "head_dim", "message"),
  [
    ("bfloat16", 48, "k: K . D a multiple of 128; got 96"),
    ("bfloat16", 192, "k: K . D other than 384 for a pool of bfloat16;"),
    ("float8_e4m3fn", 384, "k: K . D other than 768 for a pool of float8_"),
    ("float8_e4m3fn", 64, "k: K . D a multiple of 256; got 128"),
    ("float8_e5m2", 128, "kv_pool: numbers of .* got float8_e5m2"),
  ],
)
def test_the_kernel_names_what_it_does_not_cover(dtype, head_dim, message):
  k = jnp.ones((1, 2, head_dim))
  pool = jnp.ones((2, 1, 2, 2, 8, head_dim), dtype)
  with pytest.raises(NotImplementedError, match=message):
    mosaic_gpu.append(pool, 0, k, k, _ints(1), _ints(0))
