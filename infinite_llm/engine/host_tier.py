"""Joins the books of the HOST tiers to the devices."""

import os
from collections.abc import Callable

import jax
from absl import logging

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.host_memory import check_host_memory, host_memory
from infinite_llm.cache.host_pool import Copy, HostPool
from infinite_llm.cache_config import CacheConfig
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.effects import SwapBlocks
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.types import InstanceId, Tier

_REPORTS = 10
"""Lines of the log that tell how far allocating a HOST pool is."""


class HostTiers:
  """rBlocks of this process's instances in host memory, if the config wants it.

  Attributes:
    pools: HOST pool of each instance; empty if there are none.
  """

  def __init__(self, config: CacheConfig, runner: ModelRunner):
    """Allocates all host memory, which takes seconds; blocks the host.

    Args:
      config: Sizes of the pools.
      runner: The devices.

    Raises:
      ConfigError: If host memory, or what of it may be pinned, does not do.
    """
    self._config = config
    self._runner = runner
    self.pools: list[HostPool] = []
    self._copies: list[tuple[InstanceId, SwapBlocks, Copy]] = []
    if not config.host_blocks:
      return
    pool_bytes = (config.host_blocks - 1) * runner.pool.block_bytes
    check_host_memory(
      len(runner.instances) * pool_bytes,
      "host_blocks",
      config.host_blocks,
      host_memory(os.environ, jax.default_backend()),
    )
    self.pools += (
      HostPool(
        runner.pool.row(own),
        runner.row_meshes[own],
        name=instance,
        num_blocks=config.host_blocks,
        run=runner.programs.run,
        verify=config.verify_moves,
        progress=_reporter(instance),
      )
      for own, instance in enumerate(runner.instances)
    )

  @property
  def is_copying(self) -> bool:
    """Whether any copy is under way."""
    return bool(self._copies)

  def books(self, instance: InstanceId) -> HostTier | None:
    """Makes the books of an instance's HOST tier; None if it has none."""
    if not self._config.host_blocks:
      return None
    return HostTier(
      pool=BlockPool(instance, self._config.host_blocks, tier=Tier.HOST),
      costs=SwapCosts(
        block_bytes=self._runner.pool.block_bytes,
        link_bytes_per_s=self._config.host_link_bytes_per_s,
        recompute_tokens_per_s=self._config.recompute_tokens_per_s,
      ),
    )

  def begin(self, instance: InstanceId, effect: SwapBlocks) -> None:
    """Has rBlocks of an instance copied as soon as there is room for them."""
    if not self.pools:
      raise InvariantError(f"Instance {instance} has no HOST pool: {effect}.")
    own = self._runner.instances.index(instance)
    copy = self.pools[own].copy(effect.to_tier, effect.swaps)
    self._copies.append((instance, effect, copy))

  def advance(self) -> list[tuple[InstanceId, SwapBlocks]]:
    """Launches what there is room for; never waits.

    Returns:
      Effects that were carried out, each with its instance.
    """
    for own, host in enumerate(self.pools):
      if not host.is_idle:
        pool = host.advance(self._runner.pool.row(own))
        self._runner.pool.set_row(own, pool)
    ended = [(i, effect) for i, effect, copy in self._copies if copy.is_done]
    self._copies = [part for part in self._copies if not part[2].is_done]
    return ended

  def warm_up(self) -> None:
    """Compiles the programs of the moves."""
    for own, host in enumerate(self.pools):
      pool = host.warm_up(self._runner.pool.row(own))
      self._runner.pool.set_row(own, pool)


def _reporter(instance: InstanceId) -> Callable[[int, int], None]:
  """Logs how far allocating is, each time another tenth is done."""
  told = 0

  def report(done: int, total: int) -> None:
    nonlocal told
    if done * _REPORTS // total > told:
      told = done * _REPORTS // total
      logging.info(
        "HOST pool of instance %d: %d of %d rBlocks allocated.",
        instance,
        done,
        total,
      )

  return report
