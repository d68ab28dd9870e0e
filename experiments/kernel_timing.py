"""Times of GPU kernels, as the device has them, and what a check needs."""

import functools
import glob
import gzip
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pallas_kernels.micro_attention.api import BlockTables


def poison(shape: Sequence[int]) -> None:
  """Fills the memory that outputs will get with NaN.

  Args:
    shape: Of an output in float32.
  """
  for _ in range(4):
    jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.float32))


def fresh_key(config: ml_collections.ConfigDict) -> jax.Array:
  """A random key of this run: no kernel may live on the numbers of the last.

  Args:
    config: Of the kernel bench; reads `seed`.

  Returns:
    The key.
  """
  return jax.random.key(time.time_ns() % 2**32 + config.seed)


def named_bytes(kv_pool: jax.Array, tables: BlockTables) -> int:
  """Bytes of a layer's keys and values in all rBlocks that tables name.

  Args:
    kv_pool: `[N, L, 2, K, P, D]` pool.
    tables: Of any number of rows.
  """
  block = math.prod(kv_pool.shape[2:]) * kv_pool.dtype.itemsize
  return int(np.sum(tables.counts)) * block


def slope_us(
  config: ml_collections.ConfigDict,
  call: Callable[[int, Any], Any],
  inputs: Any,
) -> float:
  """Microseconds of one call: median slope over calls in one program.

  Args:
    config: Of the kernel bench; reads `timing`.
    call: `call(n, inputs)` makes `n` calls and is traced.
    inputs: Pytree of arrays.

  Returns:
    The time, with whatever small kernels a call needs beside the large one.
  """
  few, many = config.timing.calls
  programs = [jax.jit(functools.partial(call, n)) for n in (few, many)]
  for program in programs:
    jax.block_until_ready(program(inputs))
  return programs_slope_us(config.timing.repeats, (few, many), programs, inputs)


def programs_slope_us(
  repeats: int,
  calls: tuple[int, int],
  programs: Sequence[Callable[..., Any]],
  *args: Any,
) -> float:
  """Microseconds of a call, from how long few and many of them take.

  Args:
    repeats: Of which the median is taken.
    calls: How many calls the programs run.
    programs: Two, compiled already.
    *args: Theirs.
  """
  slopes = []
  for _ in range(repeats):
    elapsed = []
    for run in programs:
      started = time.perf_counter()
      jax.block_until_ready(run(*args))
      elapsed.append(time.perf_counter() - started)
    slopes.append((elapsed[1] - elapsed[0]) / (calls[1] - calls[0]) * 1e6)
  return statistics.median(slopes)


def profiled_us(
  config: ml_collections.ConfigDict,
  call: Callable[[int, Any], Any],
  inputs: Any,
  kernel: str,
) -> list[float]:
  """Microseconds of every run of one kernel, from the profiler.

  Args:
    config: Of the kernel bench; reads `timing`.
    call: `call(n, inputs)` makes `n` calls and is traced.
    inputs: Pytree of arrays.
    kernel: Part of the kernel's name on the device.

  Returns:
    The times, in no order; `repeats` programs of the larger number of calls.
  """
  calls, repeats = config.timing.calls[1], config.timing.repeats
  program = jax.jit(functools.partial(call, calls))
  times = device_times(_profile(program, inputs, repeats), kernel)
  if len(times) < repeats * calls:
    raise RuntimeError(f"The profiler saw {len(times)} runs of {kernel!r}.")
  return times


def busy_us(
  program: Callable[[Any], Any], inputs: Any, *, calls: int, programs: int
) -> float:
  """Microseconds of all kernels of a call, small ones too, by the profiler.

  Args:
    program: Jitted.
    inputs: Pytree of arrays that it takes.
    calls: That it makes.
    programs: How often it is run.

  Returns:
    What the device works, without the gaps, divided by the calls.
  """
  events = _profile(program, inputs, programs)
  streams = {
    (event["pid"], event["tid"])
    for event in events
    if event.get("name") == "thread_name"
    and event["args"]["name"].startswith("Stream")
  }
  times = [
    event["dur"]
    for event in events
    if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams
  ]
  if len(times) < calls * programs:
    raise RuntimeError(f"The profiler saw {len(times)} kernels.")
  return sum(times) / (calls * programs)


def _profile(
  program: Callable[[Any], Any], inputs: Any, repeats: int
) -> list[dict[str, Any]]:
  """The trace's events of some runs of a jitted program, compiled before."""
  jax.block_until_ready(program(inputs))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        jax.block_until_ready(program(inputs))
    events = []
    for path in glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True):
      with gzip.open(path) as file:
        events += json.load(file)["traceEvents"]
  return events


def device_times(events: list[dict[str, Any]], kernel: str) -> list[float]:
  """Picks the runs of a kernel out of a profile.

  Args:
    events: Of the trace that the profiler writes.
    kernel: Part of the kernel's name; the host has events of that name too.

  Returns:
    Microseconds of each run on a GPU.
  """
  devices = {
    event["pid"]
    for event in events
    if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
  }
  return [
    event["dur"]
    for event in events
    if event.get("ph") == "X"
    and event["pid"] in devices
    and kernel in event["name"]
  ]
