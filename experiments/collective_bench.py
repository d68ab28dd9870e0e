"""Small collectives between instances, in the data plane bench.

Queries and partial states of a decode layer are kilobytes: what counts is how
long one takes, not how many bytes a second. Each call waits for the one before.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.kernel_timing import programs_slope_us
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.exchange import api

_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)


class _Way(NamedTuple):
  """One way to do it.

  Attributes:
    collective: `all_gather` or `all_to_all`.
    implementation: Of `pallas_kernels/exchange`.
    is_loop: Whether the calls are a loop in the program; else a call each.
    options: XLA's, for the program.
  """

  collective: str
  implementation: str
  is_loop: bool
  options: dict[str, Any]


def bench(
  config: ml_collections.ConfigDict, num_instances: int
) -> Iterator[dict[str, Any]]:
  """Times both collectives by all implementations, at every size.

  Args:
    config: See `configs/data_plane_bench.py`.
    num_instances: At least two.

  Yields:
    Rows of the bench; `call_us` has a small kernel of XLA's between calls.
  """
  for num_bytes in config.collectives.bytes:
    for way in _ways(config):
      row = {
        "part": "collectives",
        "way": f"{way.collective}, {way.implementation}",
        "is_loop": way.is_loop,
        "xla_options": way.options,
        "instances": num_instances,
        "bytes": num_bytes,
      }
      yield row | _run(config, way, num_instances, num_bytes)


def _ways(config: ml_collections.ConfigDict) -> Iterator[_Way]:
  """Kernels only where there are GPUs, and XLA's options for them."""
  is_gpu = config.platform == "gpu"
  for is_loop in (False, True):
    for collective in ("all_gather", "all_to_all"):
      yield _Way(collective, "xla", is_loop, {})
      if is_gpu:
        yield _Way(collective, "mosaic_gpu", is_loop, {})
    if is_gpu:
      # By copy engines, so that no multiprocessor is needed.
      options = {"xla_gpu_use_memcpy_local_p2p": True}
      yield _Way("all_to_all", "xla", is_loop, options)


def _run(
  config: ml_collections.ConfigDict,
  way: _Way,
  num_instances: int,
  num_bytes: int,
) -> dict[str, Any]:
  mesh = make_mesh(num_instances, 1)
  # All that an instance sends; to all, or each part to one.
  words = num_bytes // 4 // num_instances * num_instances
  sent = np.arange(num_instances * words, dtype=np.int32)
  sent = sent.reshape(num_instances, num_instances, -1)
  x = jax.device_put(sent, NamedSharding(mesh, _PER_INSTANCE))

  def program(num_calls: int) -> Callable[..., jax.Array]:
    return jax.jit(
      jax.shard_map(
        functools.partial(_calls, way, num_calls),
        mesh=mesh,
        in_specs=_PER_INSTANCE,
        out_specs=_PER_INSTANCE,
        check_vma=False,
      ),
      compiler_options=way.options or None,
    )

  calls = config.collectives.calls
  programs = [program(num_calls) for num_calls in calls]
  right = [
    np.array_equal(run(x), _expected(way, num_calls, sent))
    for run, num_calls in zip(programs, calls, strict=True)
  ]
  return {
    "call_us": programs_slope_us(config.repeats, calls, programs, x),
    "correct": all(right),
    "aim": "an all_gather and an all_to_all below 25 us",
  }


def _calls(way: _Way, num_calls: int, x: jax.Array) -> jax.Array:
  """`[1, I, words]` after so many calls, each of which adds 1."""
  (x,) = x
  collective = getattr(api, way.collective)
  is_gather = way.collective == "all_gather"
  mailbox = None
  if way.implementation != "xla":
    shape = x.shape if is_gather else x.shape[1:]
    mailbox = api.open_mailbox(shape, x.dtype, INSTANCE_AXIS)
  size, me = len(x), jax.lax.axis_index(INSTANCE_AXIS)

  def call(x: jax.Array, *, is_first: bool = False) -> jax.Array:
    got, _ = collective(
      x,
      mailbox,
      axis_name=INSTANCE_AXIS,
      is_first=is_first,
      implementation=way.implementation,
    )
    return (got[(me + 1) % size] if is_gather else got) + 1

  x = call(x, is_first=True)
  if way.is_loop:
    x = jax.lax.fori_loop(1, num_calls, lambda _, x: call(x), x)
  else:
    for _ in range(1, num_calls):
      x = call(x)
  return x[None]


def _expected(way: _Way, num_calls: int, sent: np.ndarray) -> np.ndarray:
  """What `[I, I, words]` are after so many calls."""
  if way.collective == "all_gather":
    sent = np.roll(sent, -num_calls, axis=0)
  elif num_calls % 2:
    sent = sent.swapaxes(0, 1)
  return sent + num_calls
