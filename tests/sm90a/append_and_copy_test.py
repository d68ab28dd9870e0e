"""append_kv and copy_blocks assemble for Hopper, and write pools in place."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.append_kv import mosaic_gpu as append_kv
from pallas_kernels.copy_blocks import mosaic_gpu as copy_blocks
from pallas_kernels.micro_attention import mosaic_gpu
from pallas_kernels.micro_attention.block_tables import BlockTables

_of = jax.ShapeDtypeStruct


def _assert_in_place(compiled, spills, pool):
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  assert spills == [0]
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


@pytest.mark.parametrize(
  ("num_kv_heads", "head_dim", "dtype"),
  [
    (8, 128, "bfloat16"),
    (1, 128, "float16"),
    (2, 64, "bfloat16"),
    (5, 128, "bfloat16"),
    (32, 128, "bfloat16"),
    (3, 128, "float32"),
  ],
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


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.uint8])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_append_narrows_on_the_way(sm90a, is_scaled, dtype):
  pool = _of((4096, 32, 2, 8, 64, 128), dtype)
  kv, ids = _of((500, 8, 128), jnp.bfloat16), _of((500,), jnp.int32)
  layer, scale = _of((), jnp.int32), _of((8,), jnp.float32)

  def append(*arguments):
    *arguments, scale = arguments
    scale = scale if is_scaled else None
    return append_kv.append(*arguments, k_scale=scale, v_scale=scale)

  result = sm90a.compile(
    append, pool, layer, kv, kv, ids, ids, scale, donate_argnums=0
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("query_tokens", [1, 512])
def test_layers_of_append_and_attention_never_copy_the_pool(
  sm90a, query_tokens, dtype
):
  # 16 GiB of either; what is widened of bytes does not grow with the pool.
  num_blocks = 2**15 // jnp.dtype(dtype).itemsize
  pool = _of((num_blocks, 4, 2, 8, 64, 128), dtype)
  entries, num_layers = 512, 3

  def ints(*shape):
    return _of(shape, jnp.int32)

  def program(pool, q, cu_seqlens, positions, tables, ids, scale):
    scales = {}
    if dtype == jnp.uint8:
      scales = {"k_scale": scale, "v_scale": scale}
    for layer in range(num_layers):
      kv = q[:, :8]
      pool = append_kv.append(pool, layer, kv, kv, ids, ids, **scales)
      state = mosaic_gpu.micro_attention(
        q,
        cu_seqlens,
        positions,
        pool,
        layer,
        tables,
        scale=0.1,
        max_query_tokens=query_tokens,
        **scales,
      )
      q += state.out.astype(q.dtype)
    return pool, q

  compiled, spills = sm90a.compile(
    program,
    pool,
    _of((query_tokens, 32, 128), jnp.bfloat16),
    ints(2),
    ints(query_tokens),
    BlockTables(ints(entries), ints(entries), ints(1), ints(1)),
    ints(query_tokens),
    _of((8,), jnp.float32),
    donate_argnums=0,
    # Bytes are widened part by part for prefill, as many as there are.
    is_decided=not (dtype == jnp.uint8 and query_tokens > 1),
  )
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  assert len(spills) >= 2
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100
