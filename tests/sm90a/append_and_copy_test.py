"""append_kv and copy_blocks assemble for Hopper, and write pools in place."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.append_kv import mosaic_gpu as append_kv
from pallas_kernels.copy_blocks import mosaic_gpu as copy_blocks

_of = jax.ShapeDtypeStruct


def _assert_in_place(compiled, spills, pool):
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  assert spills == [0]
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


@pytest.mark.parametrize(
  ("num_kv_heads", "head_dim", "dtype"),
  [(8, 128, "bfloat16"), (1, 128, "float16"), (2, 64, "bfloat16")],
)
def test_append_writes_a_donated_pool_in_place(
  sm90a, num_kv_heads, head_dim, dtype
):
  pool = _of((4096, 32, 2, num_kv_heads, 64, head_dim), dtype)
  kv, ids = _of((500, num_kv_heads, head_dim), dtype), _of((500,), jnp.int32)
  layer = _of((), jnp.int32)
  result = sm90a.compile(
    append_kv.append, pool, layer, kv, kv, ids, ids, donate_argnums=0
  )
  _assert_in_place(*result, pool)


def test_append_casts_on_the_way(sm90a):
  pool = _of((4096, 32, 2, 8, 64, 128), jnp.bfloat16)
  kv, ids = _of((500, 8, 128), jnp.float32), _of((500,), jnp.int32)
  layer = _of((), jnp.int32)
  result = sm90a.compile(
    append_kv.append, pool, layer, kv, kv, ids, ids, donate_argnums=0
  )
  _assert_in_place(*result, pool)


def test_unpack_writes_a_donated_pool_in_place(sm90a):
  pool = _of((4096, 32, 2, 8, 64, 128), jnp.bfloat16)
  blocks, ids = _of((64, *pool.shape[1:]), pool.dtype), _of((64,), jnp.int32)
  valid = _of((64,), jnp.bool_)
  result = sm90a.compile(
    copy_blocks.unpack, pool, blocks, ids, valid, donate_argnums=0
  )
  _assert_in_place(*result, pool)


def test_pack_needs_no_memory_but_its_result(sm90a):
  pool = _of((4096, 32, 2, 8, 64, 128), jnp.bfloat16)
  compiled, spills = sm90a.compile(
    copy_blocks.pack, pool, _of((64,), jnp.int32)
  )
  assert spills == [0]
  assert compiled.memory_analysis().temp_size_in_bytes == 0
