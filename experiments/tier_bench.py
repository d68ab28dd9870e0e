"""The HOST tier of the data plane bench: link speeds, and what steps pay."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.decode_steps import DecodeSteps
from infinite_llm.cache.host_pool import HostPool
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.types import Tier
from pallas_kernels.copy_blocks.api import pack_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Move:
  """As `TierMove`; the tags are those of rBlocks without content."""

  src_block: int
  src_tag: int = 0
  dst_block: int
  dst_tag: int = 0


class _Tier:
  """HOST pool of one instance of the bench, as large as its spare rBlocks."""

  def __init__(self, steps: DecodeSteps, instance: int):
    self._runner: ModelRunner = steps.runner
    self._instance = instance
    self._hbm = steps.free_blocks
    self._host = HostPool(
      steps.runner.pool.row(instance),
      steps.runner.row_meshes[instance],
      name=instance,
      num_blocks=1 + len(self._hbm),
      run=steps.runner.programs.run,
    )

  @property
  def num_moved(self) -> int:
    return self._host.num_moved.total()

  def begin(self, to_tier: Tier, count: int) -> None:
    """Queues the first rBlocks of one tier for the other."""
    self._host.copy(to_tier, _moves(to_tier, self._hbm, count))

  def advance(self) -> None:
    pool = self._host.advance(self._runner.pool.row(self._instance))
    self._runner.pool.set_row(self._instance, pool)

  def keep_busy(self, to_tier: Tier) -> None:
    """Advances, and queues all again when nothing is left."""
    if self._host.is_idle:
      self.begin(to_tier, len(self._hbm))
    self.advance()

  @property
  def is_idle(self) -> bool:
    return self._host.is_idle

  def drain(self) -> None:
    pool = self._host.drain(self._runner.pool.row(self._instance))
    self._runner.pool.set_row(self._instance, jax.block_until_ready(pool))


def bench(
  config: ml_collections.ConfigDict, num_instances: int
) -> Iterator[dict[str, Any]]:
  """Times moves between HBM and host memory.

  Args:
    config: See `configs/data_plane_bench.py`.
    num_instances: Devices to use.

  Yields:
    Rows of the bench.
  """
  steps = DecodeSteps(config, num_instances, max(config.tiers.blocks))
  yield _check(config, steps)
  tiers = [_Tier(steps, instance) for instance in range(num_instances)]
  block_bytes = steps.runner.pool.block_bytes
  for to_tier in Tier:
    for count in config.tiers.blocks:
      yield _row(
        "host pool",
        to_tier,
        count,
        1,
        block_bytes,
        _median_s(config.repeats, partial(_move, tiers[:1], to_tier, count)),
      )
      yield _row(
        "one array",
        to_tier,
        count,
        1,
        block_bytes,
        _one_array_s(config, steps, to_tier, count),
      )
    if num_instances > 1:
      count = max(config.tiers.blocks)
      yield _row(
        "host pool",
        to_tier,
        count,
        num_instances,
        block_bytes,
        _median_s(config.repeats, partial(_move, tiers, to_tier, count)),
      )
  yield from _slowdown(config, steps, tiers, block_bytes)


def _check(
  config: ml_collections.ConfigDict, steps: DecodeSteps
) -> dict[str, Any]:
  """There and back into other places, with checksums and looked at."""
  count = len(steps.free_blocks) // 2
  ids = np.asarray(steps.free_blocks, np.int32)
  pool = steps.runner.pool.row(0)

  @partial(jax.jit, donate_argnums=0)
  def fill(kv, key):
    drawn = jax.random.normal(key, (count, *kv.shape[1:]), kv.dtype)
    return kv.at[ids[:count]].set(drawn)

  @jax.jit
  def is_equal(kv):
    return (kv[ids[:count]] == kv[ids[count : 2 * count]]).all()

  pool = pool._replace(kv=fill(pool.kv, jax.random.key(config.seed)))
  was_equal = bool(is_equal(pool.kv))
  host = HostPool(
    pool,
    steps.runner.row_meshes[0],
    name="check",
    num_blocks=1 + count,
    run=steps.runner.programs.run,
    verify=True,
  )
  for to_tier, own in ((Tier.HOST, ids[:count]), (Tier.HBM, ids[count:])):
    host.copy(to_tier, _moves(to_tier, own.tolist(), count))
    pool = host.drain(pool)
  steps.runner.pool.set_row(0, pool)
  return {
    "part": "tier moves there and back",
    "blocks": count,
    "correct": bool(is_equal(pool.kv)) and not was_equal,
  }


def _moves(to_tier: Tier, hbm: Sequence[int], count: int) -> list[_Move]:
  """The first rBlocks of HBM, and as many of host memory, in order."""
  pairs = zip(hbm[:count], range(1, 1 + count), strict=True)
  if to_tier is Tier.HOST:
    return [_Move(src_block=a, dst_block=b) for a, b in pairs]
  return [_Move(src_block=b, dst_block=a) for a, b in pairs]


def _move(tiers: Sequence[_Tier], to_tier: Tier, count: int) -> None:
  for tier in tiers:
    tier.begin(to_tier, count)
  while not all(tier.is_idle for tier in tiers):
    for tier in tiers:
      tier.advance()
  for tier in tiers:
    tier.drain()


def _one_array_s(
  config: ml_collections.ConfigDict,
  steps: DecodeSteps,
  to_tier: Tier,
  count: int,
) -> float:
  """All rBlocks as one array: the link alone, without a pool at either end."""
  kv = steps.runner.pool.row(0).kv
  ids = np.asarray(steps.free_blocks[:count], np.int32)
  hbm = jax.jit(pack_blocks, out_shardings=kv.sharding)(kv, ids)
  host_sharding = kv.sharding.with_memory_kind("pinned_host")
  source, target = hbm, host_sharding
  if to_tier is Tier.HBM:
    source = jax.device_put(hbm, host_sharding, may_alias=False)
    target = kv.sharding

  def move() -> None:
    jax.block_until_ready(jax.device_put(source, target, may_alias=False))

  jax.block_until_ready(source)
  return _median_s(config.repeats, move)


def _slowdown(
  config: ml_collections.ConfigDict,
  steps: DecodeSteps,
  tiers: Sequence[_Tier],
  block_bytes: int,
) -> Iterator[dict[str, Any]]:
  """Decode steps with moves at full speed beside them, and without."""
  alone_s = steps.median_s(config.step.steps)
  for to_tier in Tier:

    def move(to_tier: Tier = to_tier) -> None:
      for tier in tiers:
        tier.keep_busy(to_tier)

    for tier in tiers:
      tier.drain()
    begun = sum(tier.num_moved for tier in tiers)
    started = time.perf_counter()
    beside_s = steps.median_s(config.step.steps, move)
    wall_s = time.perf_counter() - started
    moved = sum(tier.num_moved for tier in tiers) - begun
    yield {
      "part": "decode beside tier moves",
      "to": to_tier.name,
      "rows": config.step.rows,
      "context": config.step.context,
      "instances": len(tiers),
      "step_ms": alone_s * 1e3,
      "step_beside_ms": beside_s * 1e3,
      "slowdown": beside_s / alone_s - 1,
      "gb_per_s": moved * block_bytes / wall_s / 1e9,
      "aim": "slowdown below 0.02",
    }
  for tier in tiers:
    tier.drain()


def _median_s(repeats: int, move: Callable[[], None]) -> float:
  move()
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    move()
    times.append(time.perf_counter() - started)
  return statistics.median(times)


def _row(
  way: str,
  to_tier: Tier,
  count: int,
  num_instances: int,
  block_bytes: int,
  time_s: float,
) -> dict[str, Any]:
  return {
    "part": "tier moves",
    "way": way,
    "to": to_tier.name,
    "blocks": count,
    "block_bytes": block_bytes,
    "instances": num_instances,
    "time_ms": time_s * 1e3,
    "gb_per_s": num_instances * count * block_bytes / time_s / 1e9,
    "aim": "47 GB/s each way for 64 or more rBlocks",
  }
