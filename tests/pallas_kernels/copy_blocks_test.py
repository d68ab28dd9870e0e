"""pack_blocks and unpack_blocks carry whole rBlocks, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.copy_blocks import mosaic_gpu
from pallas_kernels.copy_blocks.api import pack_blocks, unpack_blocks
from pallas_kernels.interpreted import settled
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_N, _SHAPE = 7, (2, 2, 3, 8, 32)


def _each(call, interpreted):
  """Every implementation, the kernel interpreted, and compiled on a GPU."""
  params = plgpu.InterpretGPUParams(detect_races=True)

  def interpret(*args):
    return settled(interpreted(*args, interpret=params), params)

  return pytest.mark.parametrize(
    "call",
    [
      pytest.param(functools.partial(call, implementation="xla"), id="xla"),
      pytest.param(interpret, id="mosaic_gpu_interpreted"),
      pytest.param(
        functools.partial(call, implementation="mosaic_gpu"),
        id="mosaic_gpu",
        marks=pytest.mark.gpu,
      ),
    ],
  )


_each_pack = _each(pack_blocks, mosaic_gpu.pack)
_each_unpack = _each(unpack_blocks, mosaic_gpu.unpack)


def _blocks(count: int, seed: int, dtype=jnp.float32) -> jax.Array:
  rng = np.random.default_rng(seed)
  if dtype == "uint8":  # As many bytes: the kernel wants multiples of 2 KiB.
    shape = (count, *_SHAPE[:-1], 4 * _SHAPE[-1])
    return jnp.asarray(rng.integers(0, 256, shape), dtype)
  return jnp.asarray(rng.standard_normal((count, *_SHAPE)), dtype)


def _ints(*values: int) -> jax.Array:
  return jnp.asarray(values, jnp.int32)


@_each_pack
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_pack_takes_blocks_in_order(dtype, call):
  pool = _blocks(_N, 0, dtype)
  ids = [5, 1, NULL_BLOCK_ID, 6, NULL_BLOCK_ID]
  blocks = call(pool, _ints(*ids))
  assert blocks.dtype == pool.dtype
  np.testing.assert_array_equal(blocks, np.asarray(pool)[ids])


@_each_unpack
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_unpack_writes_valid_blocks_only(dtype, call):
  pool, blocks = _blocks(_N, 0, dtype), _blocks(4, 1, dtype)
  valid = jnp.array([True, False, True, False])
  result = call(pool, blocks, _ints(5, 1, 2, 2), valid)
  expected = np.array(pool)
  expected[5], expected[2] = blocks[0], blocks[2]
  np.testing.assert_array_equal(result, expected)


@_each_unpack
def test_ids_of_invalid_blocks_may_be_anything(call):
  pool, blocks = _blocks(_N, 0), _blocks(4, 1)
  result = call(
    pool,
    blocks,
    _ints(-1, _N, 2**31 - 1, 3),
    jnp.zeros(4, bool),
  )
  np.testing.assert_array_equal(result, pool)


@_each_unpack
def test_ids_outside_of_the_pool_are_dropped(call):
  pool, blocks = _blocks(_N, 0), _blocks(2, 1)
  result = call(pool, blocks, _ints(-1, _N), jnp.ones(2, bool))
  np.testing.assert_array_equal(result, pool)


def test_unpack_undoes_pack():
  source, ids = _blocks(_N, 0), _ints(3, 6, 1)
  blocks = pack_blocks(source, ids)
  result = unpack_blocks(jnp.zeros_like(source), blocks, ids, jnp.ones(3, bool))
  np.testing.assert_array_equal(result[ids], source[ids])


def test_moving_blocks_needs_the_staging_buffer_only():
  of = jax.ShapeDtypeStruct
  num_staged = 8
  pool = of((4096, 32, 2, 8, 64, 128), jnp.bfloat16)
  ids = of((num_staged,), jnp.int32)

  def move(pool, sent, received, valid):
    return unpack_blocks(pool, pack_blocks(pool, sent), received, valid)

  compiled = jax.jit(move, donate_argnums=0)
  compiled = compiled.lower(pool, ids, ids, of((num_staged,), bool)).compile()
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  staging_bytes = pool_bytes // 4096 * num_staged
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100 + staging_bytes


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kv_pool": _blocks(_N, 0)[0]}, r"kv_pool must be \[N, L, 2, K, P, D\]"),
    ({"blocks": _blocks(3, 1)}, r"blocks must be \[Q, L, 2, K, P, D\] = \[2, "),
    (
      {"blocks": _blocks(2, 1, "float16")},
      "blocks must be float32, as kv_pool",
    ),
    ({"block_ids": _ints(1)[0]}, r"block_ids must be \[Q\]; got \[\]"),
    ({"block_ids": jnp.zeros(2)}, "block_ids must be int32; got float32"),
    ({"valid": jnp.ones(3, bool)}, r"valid must be \[Q\] = \[2\]; got \[3\]"),
    ({"valid": _ints(0, 1)}, "valid must be bool; got int32"),
    ({"implementation": "cuda"}, "one of mosaic_gpu, xla; got 'cuda'"),
  ],
)
def test_a_wrong_call_names_argument_rule_and_value(changes, message):
  arguments = {
    "kv_pool": _blocks(_N, 0),
    "blocks": _blocks(2, 1),
    "block_ids": _ints(1, 2),
    "valid": jnp.ones(2, bool),
  }
  with pytest.raises(ValueError, match=message):
    unpack_blocks(**(arguments | changes))


def test_the_kernel_names_what_it_does_not_cover():
  pool = jnp.ones((2, 1, 2, 1, 8, 24))
  for kernel, *arguments in (
    (mosaic_gpu.pack, _ints(1)),
    (mosaic_gpu.unpack, pool[:1], _ints(1), jnp.ones(1, bool)),
  ):
    with pytest.raises(NotImplementedError, match="kv_pool: rBlocks in mult"):
      kernel(pool, *arguments)
