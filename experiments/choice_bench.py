"""Which kernel of micro-attention is faster at few query tokens a row.

What `pallas_kernels/micro_attention/mosaic_gpu.py` has in its table.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.kernel_timing import busy_us, fresh_key, named_bytes
from pallas_kernels.micro_attention.api import BlockTables, micro_attention

_NUM_LAYERS = 2
_BLOCK_SIZE = 64
_HEADS = (32, 8)
_HEAD_DIM = 128
_CALLS, _PROGRAMS = 12, 5


def bench(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """Times both kernels with the same queries.

  Args:
    config: Of the kernel bench; reads `choice`.

  Yields:
    Rows of the bench; each kernel's peer is the other one.
  """
  names = ("mosaic_gpu_decode", "mosaic_gpu_prefill")
  for kv_dtype, (rows, context), query_tokens in itertools.product(
    config.choice.kv_dtypes, config.choice.shapes, config.choice.query_tokens
  ):
    inputs = _draw(config, query_tokens, rows, context, kv_dtype)
    num_bytes = named_bytes(inputs["kv_pool"], inputs["tables"])
    times = [_time_us(inputs, query_tokens, name) for name in names]
    case = f"{query_tokens} query tokens, {rows} x {context}"
    if kv_dtype == "float8_e4m3fn":
      case += " fp8"
    for name, other, us, other_us in zip(
      names, names[::-1], times, times[::-1], strict=True
    ):
      print(f"{case:36} {name:20} {us:8.1f} us", flush=True)
      yield {
        "kernel": "choice",
        "implementation": name,
        "case": case,
        "time_us": us,
        "tb_per_s": num_bytes / us / 1e6,
        "peer": other,
        "peer_us": other_us,
        "ratio": us / other_us,
        "error": None,
        "correct": None,
      }


def _draw(
  config: ml_collections.ConfigDict,
  query_tokens: int,
  rows: int,
  context: int,
  kv_dtype: str,
) -> dict[str, Any]:
  """Random queries at the end of each row's context, random rBlock order."""
  count = context // _BLOCK_SIZE
  ids = 1 + np.random.default_rng(config.seed).permutation(rows * count)
  num_q_heads, num_kv_heads = _HEADS
  shape = (rows * count + 1, _NUM_LAYERS, 2, num_kv_heads, _BLOCK_SIZE)
  kv_key, q_key = jax.random.split(fresh_key(config))
  q_shape = (rows * query_tokens, num_q_heads, _HEAD_DIM)
  tables = (
    ids,
    np.tile(np.arange(count), rows),
    np.arange(rows) * count,
    np.full(rows, count),
  )
  positions = np.tile(np.arange(context - query_tokens, context), rows)
  return {
    "q": jax.random.normal(q_key, q_shape, jnp.bfloat16),
    "cu_seqlens": jnp.arange(rows + 1, dtype=jnp.int32) * query_tokens,
    "q_positions": jnp.asarray(positions, jnp.int32),
    "kv_pool": jax.random.normal(
      kv_key, (*shape, _HEAD_DIM), jnp.bfloat16
    ).astype(kv_dtype),
    "tables": BlockTables(*(jnp.asarray(x, jnp.int32) for x in tables)),
  }


def _time_us(inputs: dict[str, Any], query_tokens: int, name: str) -> float:
  """Time of a call's kernels, small ones too."""

  @jax.jit
  def call_often(inputs: dict[str, Any]) -> jax.Array:
    never = jnp.int32(0)
    for i in range(_CALLS):
      state = micro_attention(
        **inputs,
        layer=i % _NUM_LAYERS + never,
        scale=_HEAD_DIM**-0.5,
        max_query_tokens=query_tokens,
        implementation=name,
      )
      never = (state.lse[0, 0] > 1e30).astype(jnp.int32)
    return state.lse

  return busy_us(call_often, inputs, calls=_CALLS, programs=_PROGRAMS)
