"""The copying kernels of the kernel bench: append_kv, pack and unpack."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.kernel_timing import fresh_key
from pallas_kernels.append_kv import api as append_kv
from pallas_kernels.copy_blocks import api as copy_blocks

_KV_SHAPE = (8, 128)  # `K` and `D` of an 8B Llama-3.
_BLOCK_SIZE = 64
_SOURCES = 4  # Of what is appended, in turn, so that no cache holds it.

TimeUs = Callable[[ml_collections.ConfigDict, Callable, Any], float]


def bench(
  config: ml_collections.ConfigDict, anchors: Mapping, time_us: TimeUs
) -> Iterator[dict[str, Any]]:
  """Checks and times every implementation of each copying kernel.

  Args:
    config: Of the kernel bench; reads `copies`, and what `time_us` reads.
    anchors: The anchors file.
    time_us: As for `prefill_bench.bench`.

  Yields:
    Rows of the bench; their peer is a copy at the device's speed.
  """
  row = functools.partial(_row, anchors["ceilings"]["copy_TB_per_s"])
  for num_tokens in config.copies.append_tokens:
    for name in append_kv.IMPLEMENTATIONS.names:
      case = f"{num_tokens} tokens, 8 KV heads, P {_BLOCK_SIZE}"
      us, right = _bench_append(config, num_tokens, name, time_us)
      moved = 2 * 2 * num_tokens * 2 * np.prod(_KV_SHAPE)
      yield row("append_kv", name, case, us, moved, right)
  for num_blocks in config.copies.blocks:
    for name in copy_blocks.PACK_IMPLEMENTATIONS.names:
      timed = _bench_moves(config, num_blocks, name, time_us)
      for kernel, (us, right) in timed.items():
        moved = 2 * num_blocks * 2**23
        case = f"{num_blocks} rBlocks of 8 MiB"
        yield row(kernel, name, case, us, moved, right)


def _row(
  ceiling: float,
  kernel: str,
  implementation: str,
  case: str,
  us: float,
  moved_bytes: float,
  is_right: bool,
) -> dict[str, Any]:
  tb_per_s = moved_bytes / us / 1e6
  peer_us = moved_bytes / ceiling / 1e6
  print(
    f"{case:36} {kernel:14} {implementation:12} {us:8.1f} us"
    f" {tb_per_s:5.2f} TB/s {tb_per_s / ceiling:.2f} of copy speed"
    f" {'right' if is_right else 'WRONG'}",
    flush=True,
  )
  return {
    "kernel": kernel,
    "implementation": implementation,
    "case": case,
    "time_us": us,
    "tb_per_s": tb_per_s,
    "roofline": tb_per_s / ceiling,
    "peer": "copy, read and write (anchor)",
    "peer_us": peer_us,
    "ratio": us / peer_us,
    "error": None,
    "correct": is_right,
  }


def _bench_append(
  config: ml_collections.ConfigDict, num_tokens: int, name: str, time_us: TimeUs
) -> tuple[float, bool]:
  """Appends to random rBlocks; microseconds of a call, and whether right."""
  num_layers = 4
  count = num_tokens // _BLOCK_SIZE
  rng = np.random.default_rng(config.seed)
  ids = np.repeat(1 + rng.permutation(count), _BLOCK_SIZE)
  block_ids = jnp.asarray(ids, jnp.int32)
  offsets = jnp.arange(num_tokens, dtype=jnp.int32) % _BLOCK_SIZE
  heads, dim = _KV_SHAPE
  shape = (count + 1, num_layers, 2, heads, _BLOCK_SIZE, dim)
  keys = jax.random.split(fresh_key(config), _SOURCES)
  kv = [
    jax.random.normal(key, (2, num_tokens, *_KV_SHAPE), jnp.bfloat16)
    for key in keys
  ]
  inputs = jnp.zeros(shape, jnp.bfloat16), [(k, v) for k, v in kv]

  def call(calls: int, inputs: Any) -> jax.Array:
    pool, sources = inputs
    for i in range(calls):
      k, v = sources[i % _SOURCES]
      pool = append_kv.append_kv(
        pool, i % num_layers, k, v, block_ids, offsets, implementation=name
      )
    return pool

  @jax.jit
  def is_right(pool: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    written = jnp.stack([k, v], axis=1)
    right = (pool[block_ids, 0, :, :, offsets] == written).all()
    return right & ~pool[:, 1:].any() & ~pool[0].any()

  once = jax.jit(call, static_argnums=0)(1, inputs)
  right = bool(is_right(once, *inputs[1][0]))
  return time_us(config, call, inputs), right


def _bench_moves(
  config: ml_collections.ConfigDict, num_blocks: int, name: str, time_us: TimeUs
) -> dict[str, tuple[float, bool]]:
  """Packs and unpacks random rBlocks of a pool four times as large."""
  shape = (4 * num_blocks, 32, 2, 8, _BLOCK_SIZE, 128)
  rng = np.random.default_rng(config.seed)
  ids = jnp.asarray(rng.permutation(shape[0]).reshape(4, -1), jnp.int32)
  valid = jnp.ones(num_blocks, bool)
  pool = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(
    fresh_key(config)
  )
  pack = functools.partial(copy_blocks.pack_blocks, implementation=name)
  unpack = functools.partial(copy_blocks.unpack_blocks, implementation=name)

  def pack_often(calls: int, inputs: Any) -> jax.Array:
    pool, ids = inputs
    never = jnp.int32(0)
    for i in range(calls):
      # Nothing less than all of it may be made.
      blocks = jax.lax.optimization_barrier(pack(pool, ids[i % 4] + never))
      first = blocks[0, 0, 0, 0, 0, 0].astype(jnp.float32)
      never = (first > 1e30).astype(jnp.int32)
    return never

  def unpack_often(calls: int, inputs: Any) -> jax.Array:
    pool, blocks, ids = inputs
    for i in range(calls):
      pool = unpack(pool, blocks, ids[i % 4], valid)
    return pool

  blocks = jax.jit(pack)(pool, ids[0])
  right = bool((blocks == pool[ids[0]]).all())
  timed = {"pack_blocks": (time_us(config, pack_often, (pool, ids)), right)}
  there = jax.jit(unpack)(pool, blocks, ids[1], valid)
  right = bool((there[ids[1]] == blocks).all())
  right &= bool((there[ids[2:]] == pool[ids[2:]]).all())
  del there
  inputs = pool, blocks, ids
  timed["unpack_blocks"] = time_us(config, unpack_often, inputs), right
  return timed
