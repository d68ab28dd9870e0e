"""The prefill kernel assembles for Hopper: few spills, no memory too many."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.micro_attention.mosaic_gpu_prefill import prefill

# What the copying warpgroup knows of an rBlock takes registers, and it has few.
_MOST_SPILLED = 192


def _compile(
  sm90a,
  *,
  num_tokens=2048,
  num_q_heads=32,
  num_kv_heads=8,
  head_dim=128,
  block_size=64,
  dtype=jnp.bfloat16,
  **options,
):
  of = jax.ShapeDtypeStruct
  rows, entries = 2, 4096

  def ints(*shape):
    return of(shape, jnp.int32)

  return sm90a.compile(
    functools.partial(
      prefill,
      scale=head_dim**-0.5,
      max_query_tokens=num_tokens,
      **options,
    ),
    of((num_tokens, num_q_heads, head_dim), dtype),
    ints(rows + 1),
    ints(num_tokens),
    of((5000, 2, 2, num_kv_heads, block_size, head_dim), dtype),
    ints(),
    BlockTables(ints(entries), ints(entries), ints(rows), ints(rows)),
  )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_every_tuning_assembles(sm90a, block_size, head_dim):
  _, spills = _compile(sm90a, block_size=block_size, head_dim=head_dim)
  assert len(spills) == 1
  assert spills[0] <= _MOST_SPILLED


@pytest.mark.parametrize(
  "options",
  [
    {"num_q_heads": 8},
    {"num_q_heads": 56},
    {"num_q_heads": 32, "num_kv_heads": 1, "dtype": jnp.float16},
    {"num_q_heads": 71, "num_kv_heads": 1, "head_dim": 64},
    {"num_q_heads": 128, "num_kv_heads": 1},
    {"sliding_window": 4096},
    {"logit_soft_cap": 30.0},
    {"num_tokens": 61},
  ],
  ids=str,
)
def test_heads_and_options_assemble(sm90a, options):
  _, spills = _compile(sm90a, **options)
  assert spills[0] <= _MOST_SPILLED


def test_the_pool_is_not_copied(sm90a):
  compiled, _ = _compile(sm90a)
  memory = compiled.memory_analysis()
  pool_bytes = 5000 * 2 * 2 * 8 * 64 * 128 * 2
  assert memory.temp_size_in_bytes < pool_bytes / 100
