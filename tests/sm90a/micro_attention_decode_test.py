"""The decode kernel assembles for Hopper: no spills, no memory too many."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.mosaic_gpu_decode import decode

_MODELS = [  # Query heads, KV heads, head dimension.
  (32, 8, 128),
  (8, 1, 128),
  (32, 32, 128),
  (28, 4, 128),
  (16, 1, 64),
  (32, 1, 128),
  (16, 1, 256),
  (16, 16, 64),
  (14, 2, 64),
  (9, 3, 128),
  (71, 1, 64),
  (96, 2, 128),
  (128, 1, 256),
]


def _compile(
  sm90a,
  *,
  num_q_heads=32,
  num_kv_heads=8,
  head_dim=128,
  block_size=64,
  query_tokens=1,
  dtype=jnp.bfloat16,
  kv_dtype=None,
  **options,
):
  of = jax.ShapeDtypeStruct
  rows, entries = 16, 4096

  def ints(*shape):
    return of(shape, jnp.int32)

  def call(*args):
    *inputs, scales = args
    return decode(
      *inputs,
      scale=head_dim**-0.5,
      max_query_tokens=query_tokens,
      **options,
      **scales,
    )

  names = () if kv_dtype is None else ("k_scale", "v_scale")
  return sm90a.compile(
    call,
    of((rows * query_tokens, num_q_heads, head_dim), dtype),
    ints(rows + 1),
    ints(rows * query_tokens),
    of((5000, 2, 2, num_kv_heads, block_size, head_dim), kv_dtype or dtype),
    ints(),
    BlockTables(ints(entries), ints(entries), ints(rows), ints(rows)),
    {name: of((num_kv_heads,), jnp.float32) for name in names},
  )


@pytest.mark.parametrize("query_tokens", [1, 8])
@pytest.mark.parametrize("model", _MODELS, ids=str)
def test_every_shape_of_model_assembles_without_spills(
  sm90a, model, query_tokens
):
  num_q_heads, num_kv_heads, head_dim = model
  _, spills = _compile(
    sm90a,
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    query_tokens=query_tokens,
  )
  assert spills == [0]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_every_block_size_assembles_without_spills(sm90a, block_size, head_dim):
  _, spills = _compile(sm90a, block_size=block_size, head_dim=head_dim)
  assert spills == [0]


@pytest.mark.parametrize("query_tokens", [1, 8])
def test_windows_and_soft_caps_assemble_without_spills(sm90a, query_tokens):
  _, spills = _compile(
    sm90a,
    query_tokens=query_tokens,
    block_size=16,
    dtype=jnp.float16,
    sliding_window=4096,
    logit_soft_cap=30.0,
  )
  assert spills == [0]


@pytest.mark.parametrize("query_tokens", [1, 8])
@pytest.mark.parametrize(
  "model",
  [
    (32, 8, 128),
    (8, 1, 128),
    (32, 32, 128),
    (32, 1, 64),
    (16, 2, 256),
    (71, 1, 64),
    (40, 1, 128),
    (128, 1, 256),
  ],
  ids=str,
)
def test_pools_of_8_bits_assemble_without_spills(sm90a, model, query_tokens):
  num_q_heads, num_kv_heads, head_dim = model
  _, spills = _compile(
    sm90a,
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    query_tokens=query_tokens,
    kv_dtype=jnp.float8_e4m3fn,
    block_size=16 if query_tokens > 1 else 64,
    sliding_window=4096,
    logit_soft_cap=30.0,
  )
  assert spills == [0]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(
  ("num_q_heads", "num_kv_heads", "sliding_window"),
  [(16, 2, None), (28, 4, 4096)],
)
def test_pools_of_8_bits_of_every_block_size_assemble_without_spills(
  sm90a, num_q_heads, num_kv_heads, sliding_window, block_size, head_dim
):
  _, spills = _compile(
    sm90a,
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    block_size=block_size,
    head_dim=head_dim,
    kv_dtype=jnp.float8_e4m3fn,
    sliding_window=sliding_window,
  )
  assert spills == [0]


def test_the_pool_is_not_copied(sm90a):
  compiled, _ = _compile(sm90a)
  memory = compiled.memory_analysis()
  pool_bytes = 5000 * 2 * 2 * 8 * 64 * 128 * 2
  assert memory.temp_size_in_bytes < pool_bytes / 100
