"""rBlocks that go from instance to instance: in bulk, and one a step.

A part of the data plane bench, in one process. By itself it also runs with a
process for each instance, as engines do, none of which launches for another:

    python -m experiments.launch.local --num_processes=2 --
      --config=configs/exchange_bench.py --workdir=runs/exchange_bench
"""

import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from experiments.decode_steps import DecodeSteps
from experiments.run_facts import run_facts
from infinite_llm.cache.movement import Payloads
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.distributed.runtime import current_group
from infinite_llm.engine import programs
from infinite_llm.engine.group_inputs import empty_payloads

_EPOCH = 1
_TAG = 1
_SHIFT = 1


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs the bench.

  Args:
    config: See `configs/exchange_bench.py`.
    workdir: Gets `rows.json`, written anew after each row.

  Returns:
    `rows`, and whether all rBlocks arrived bit for bit (`correct`).
  """
  cluster = config.cluster
  if current_group() is None:  # A group has started JAX already.
    choose_platform(cluster.platform)
    check_platform(cluster.platform)
  num_processes = jax.process_count()
  about = {**run_facts(cluster.num_instances), "num_processes": num_processes}
  rows = []
  for row in bench(config, cluster.num_instances):
    rows.append({**row, **about})
    print(row, flush=True)
    text = json.dumps(rows, indent=1) + "\n"
    (workdir / "rows.json").write_text(text, encoding="utf-8")
  return {"rows": rows, "correct": all(row.get("correct", 1) for row in rows)}


def take_part(config: ml_collections.ConfigDict) -> None:
  """Does the same as `run`, in any other process of a group.

  Args:
    config: That of all processes.
  """
  for _ in bench(config, config.cluster.num_instances):
    pass


def bench(
  config: ml_collections.ConfigDict, num_instances: int
) -> Iterator[dict[str, Any]]:
  """Times rBlocks that go from instance to instance.

  Args:
    config: See `configs/data_plane_bench.py` or `configs/exchange_bench.py`.
    num_instances: At least two.

  Yields:
    Rows of the bench.
  """
  most = max(config.exchange.blocks)
  steps = DecodeSteps(config, num_instances, 2 * most)
  for instance in steps.runner.instances:
    epochs = dict.fromkeys(steps.free_blocks[most:], _EPOCH)
    steps.runner.grant_epochs(instance, epochs)
  sizes = itertools.product(
    config.exchange.blocks, ([0], list(range(num_instances)))
  )
  row = 0
  for row, (count, senders) in enumerate(sizes, start=1):
    yield _bulk(config, steps, senders, count, row)
  yield _beside_steps(config, steps, row + 1)


class _Exchange:
  """One exchange program, its payloads on the devices already.

  Each sender sends `count` rBlocks to the next instance.
  """

  def __init__(self, steps: DecodeSteps, senders: Sequence[int], count: int):
    runner = steps.runner
    self._pool = runner.pool
    mesh = self._pool.group().kv.sharding.mesh
    payloads = [
      _payloads(steps, count if instance in senders else 0, count)
      for instance in runner.instances
    ]
    self._sent = place_rows(payloads, mesh, runner.row_meshes)
    self._program = programs.build_exchange(mesh, _SHIFT)

  def time_s(self) -> float:
    started = time.perf_counter()
    pool, _ = self._program(self._pool.group(), self._sent)
    self._pool.set_group(pool)
    jax.block_until_ready(self._pool.group())
    return time.perf_counter() - started


def _payloads(steps: DecodeSteps, count: int, quota: int) -> Payloads:
  payloads = empty_payloads(quota)
  half = len(steps.free_blocks) // 2
  # Nothing was written yet, so the sources have no tag, and need none.
  payloads.src_block[:count] = steps.free_blocks[:count]
  payloads.dst_block[:count] = steps.free_blocks[half : half + count]
  payloads.dst_epoch[:count] = _EPOCH
  payloads.dst_tag[:count] = _TAG
  return payloads


def _bulk(
  config: ml_collections.ConfigDict,
  steps: DecodeSteps,
  senders: Sequence[int],
  count: int,
  row: int,
) -> dict[str, Any]:
  _fill_sources(steps, count, row)
  exchange = _Exchange(steps, senders, count)
  exchange.time_s()
  time_s = statistics.median(exchange.time_s() for _ in range(config.repeats))
  arrived = _num_arrived(steps, senders, count, row)
  num_bytes = len(senders) * count * steps.runner.pool.block_bytes
  return {
    "part": "exchange",
    "senders": len(senders),
    "instances": steps.config.num_instances,
    "blocks": count,
    "block_bytes": steps.runner.pool.block_bytes,
    "time_ms": time_s * 1e3,
    "gb_per_s": num_bytes / time_s / 1e9,
    "correct": arrived == len(senders) * count,
    "aim": "200 GB/s in bulk from one sender",
  }


def _fill_sources(steps: DecodeSteps, count: int, row: int) -> None:
  """Draws what every instance would send: for each row of the bench anew."""
  pools = steps.runner.pool
  for own, instance in enumerate(steps.runner.instances):
    for number, block in enumerate(steps.free_blocks[:count]):
      pool = pools.row(own)
      kv = _fill(pool.kv, block, (row, instance, number))
      pools.set_row(own, pool._replace(kv=kv))


def _num_arrived(
  steps: DecodeSteps, senders: Sequence[int], count: int, row: int
) -> int:
  """rBlocks that the receivers' devices hold as received, bit for bit.

  What was sent is drawn again from its seed, since the sender may be in another
  process.
  """
  num_instances = steps.config.num_instances
  half = len(steps.free_blocks) // 2
  targets = steps.free_blocks[half : half + count]
  arrived = []
  for own, instance in enumerate(steps.runner.instances):
    sender = (instance - _SHIFT) % num_instances
    pool = steps.runner.pool.row(own)
    if sender in senders:
      arrived += [
        (pool.tag[block] == _TAG)
        & _holds(pool.kv, block, (row, sender, number))
        for number, block in enumerate(targets)
      ]
  return int(_of_all(np.sum(arrived, dtype=np.int32)).sum())


@functools.partial(jax.jit, donate_argnums=0)
def _fill(kv: jax.Array, block: int, seeds: tuple[int, ...]) -> jax.Array:
  """Draws the KV of one rBlock."""
  return kv.at[block].set(_draw(kv, seeds).view(kv.dtype))


@jax.jit
def _holds(kv: jax.Array, block: int, seeds: tuple[int, ...]) -> jax.Array:
  """Whether an rBlock has just the bits that were drawn from these seeds."""
  drawn = _draw(kv, seeds)
  return (kv[block].view(drawn.dtype) == drawn).all()


def _draw(kv: jax.Array, seeds: tuple[int, ...]) -> jax.Array:
  """`[L, 2, K, P, D]` unsigned bits of normal numbers: no NaN, nothing tiny."""
  key = jax.random.key(0)
  for seed in seeds:
    key = jax.random.fold_in(key, seed)
  size = 8 * kv.dtype.itemsize
  bits = jax.random.bits(key, kv.shape[1:], f"uint{size}")
  # Of the exponent's highest two bits only the second is 1.
  first, second = (bits.dtype.type(1 << size - n) for n in (2, 3))
  return bits & ~first | second


def _of_all(values: np.ndarray) -> np.ndarray:
  """`[N, ...]` of the N processes; all call it."""
  if jax.process_count() == 1:
    return values[None]
  return multihost_utils.process_allgather(values)


def _beside_steps(
  config: ml_collections.ConfigDict, steps: DecodeSteps, row: int
) -> dict[str, Any]:
  """Every instance sends one rBlock before each decode step.

  The program is the engine's smallest one, launched as engines do. What it adds
  is as small as what differs between two runs of steps, so they take turns.
  """
  _fill_sources(steps, 1, row)
  quota = steps.config.lending.exchange_buckets[0]
  payloads = [_payloads(steps, 1, quota)] * len(steps.runner.instances)
  exchange = functools.partial(steps.runner.exchange, _SHIFT, payloads)
  exchange()  # Compiles it.
  count = config.step.steps
  rounds = [
    (steps.median_s(count), steps.median_s(count, exchange))
    for _ in range(config.step.rounds)
  ]
  # Who sends to a slower one waits for it, so the slowest is what counts.
  rounds = _of_all(np.asarray(rounds)).max(axis=0).tolist()
  shares = [beside_s / alone_s - 1 for alone_s, beside_s in rounds]
  alone_s, beside_s = map(statistics.median, zip(*rounds, strict=True))
  senders = range(steps.config.num_instances)
  return {
    "part": "decode beside one rBlock a step",
    "instances": steps.config.num_instances,
    "rows": config.step.rows,
    "context": config.step.context,
    "quota": quota,
    "step_ms": alone_s * 1e3,
    "step_beside_ms": beside_s * 1e3,
    "share": statistics.median(shares),
    "shares": shares,
    "correct": _num_arrived(steps, senders, 1, row) == len(senders),
    "aim": "share below 0.01",
  }
