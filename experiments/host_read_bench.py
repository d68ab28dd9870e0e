"""Host memory read in place by a kernel, in the data plane bench.

What attention over host memory could gain if nothing were staged in HBM: a
kernel reads words of pinned host memory over the link and sums them up, beside
a transfer of the same bytes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding

_WIDTH = 4096  # Words that a program of the grid reads at once.


def bench(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """Times both on one device.

  Args:
    config: See `configs/data_plane_bench.py`; reads `host_reads`.

  Yields:
    Rows of the bench.
  """
  programs, num_bytes = config.host_reads.programs, config.host_reads.bytes
  rounds = num_bytes // (4 * programs * _WIDTH)
  shape = (programs, rounds, _WIDTH)
  hbm = SingleDeviceSharding(jax.devices()[0])
  host = hbm.with_memory_kind("pinned_host")
  drawn = np.random.default_rng(config.seed).integers(
    1 << 30, size=shape, dtype=np.int32
  )
  words = jax.block_until_ready(jax.device_put(drawn, host))
  expected = drawn.sum(axis=1, dtype=np.int32)
  read = jax.jit(
    lambda words: _sums(words, interpret=config.platform == "cpu"),
    in_shardings=host,
    out_shardings=hbm,
  )
  for way, run in (
    ("read by a kernel", lambda: read(words)),
    ("transfer", lambda: jax.device_put(words, hbm, may_alias=False)),
  ):
    out = np.asarray(run())
    if way == "transfer":
      out = out.sum(axis=1, dtype=np.int32)
    time_s = _median_s(config.repeats, run)
    yield {
      "part": "host memory",
      "way": way,
      "bytes": words.nbytes,
      "programs": programs,
      "time_ms": time_s * 1e3,
      "gb_per_s": words.nbytes / time_s / 1e9,
      "correct": bool((out == expected).all()),
    }


def _sums(words: jax.Array, *, interpret: bool) -> jax.Array:
  """`[G, W]` int32 sums over the rounds of `[G, R, W]`, by a Triton kernel."""
  num_programs, rounds, width = words.shape

  def body(words_ref, sums_ref):
    def add(i, total):
      return total + words_ref[0, i, :]

    zeros = jnp.zeros((width,), jnp.int32)
    sums_ref[0, :] = jax.lax.fori_loop(0, rounds, add, zeros)

  return pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((num_programs, width), jnp.int32),
    grid=(num_programs,),
    in_specs=[pl.BlockSpec((1, rounds, width), lambda g: (g, 0, 0))],
    out_specs=pl.BlockSpec((1, width), lambda g: (g, 0)),
    interpret=interpret,
  )(words)


def _median_s(repeats: int, run: Callable[[], jax.Array]) -> float:
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - started)
  return statistics.median(times)
