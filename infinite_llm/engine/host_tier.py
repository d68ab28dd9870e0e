"""Joins the books of the HOST tiers to the devices."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import logging

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.host_memory import (
  check_host_memory,
  count_sharing,
  host_memory,
)
from infinite_llm.cache.host_pool import Copy, HostPool
from infinite_llm.cache.slab_store import HeldSlab, LeavingSlab, SlabStore
from infinite_llm.config import EngineConfig
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.effects import (
  DropOverflow,
  OverflowBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.overflow import OverflowRule
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.types import InstanceId, RequestUid, Tier

_REPORTS = 10
"""Lines of the log that tell how far allocating a HOST pool is."""


class _Copying(NamedTuple):
  """What is being copied between the tiers of an instance."""

  instance: InstanceId
  effect: SwapBlocks | OverflowBlocks
  copy: Copy | LeavingSlab


class _Waiting(NamedTuple):
  """A slab that is to leave an instance's HBM."""

  instance: InstanceId
  effect: OverflowBlocks


class HostTiers:
  """rBlocks of this process's instances in host memory, if the config wants it.

  Attributes:
    pools: HOST pool of each instance; empty if there are none.
    slabs: What each instance attends in host memory; empty if none does.
  """

  def __init__(self, config: EngineConfig, runner: ModelRunner):
    """Allocates all host memory, which takes seconds; blocks the host.

    Args:
      config: Sizes of the pools, and who may have what there.
      runner: The devices.

    Raises:
      ConfigError: If host memory, or what of it may be pinned, does not do,
        and if it is to be attended but adds nothing to what HBM holds.
    """
    self._config = cache = config.cache
    self._rule = _overflow_rule(config) if cache.host_attention else None
    self._runner = runner
    self.pools: list[HostPool] = []
    self.slabs: list[SlabStore] = []
    self._copies: list[_Copying] = []
    self._waiting: list[_Waiting] = []
    self._dropped: list[_Waiting] = []
    if not cache.host_blocks:
      return
    num_blocks = cache.host_blocks - 1
    if cache.host_attention:  # Each slab has a null block of its own.
      num_blocks += num_blocks // cache.slab_blocks
    # What is free is asked for before anybody takes of it.
    memory = host_memory(os.environ, jax.default_backend())
    memory = dataclasses.replace(memory, num_sharing=count_sharing())
    check_host_memory(
      len(runner.instances) * num_blocks * runner.pool.block_bytes,
      "host_blocks",
      cache.host_blocks,
      memory,
    )
    for own, instance in enumerate(runner.instances):
      if cache.host_attention:
        store = SlabStore(
          runner.row_meshes[own],
          name=instance,
          slab_blocks=cache.slab_blocks,
          run=runner.programs.run,
          verify=cache.verify_moves,
        )
        self.slabs.append(store)
    self.pools += (
      HostPool(
        runner.pool.row(own),
        runner.row_meshes[own],
        name=instance,
        num_blocks=cache.host_blocks,
        run=runner.programs.run,
        verify=cache.verify_moves,
        progress=_reporter(instance),
      )
      for own, instance in enumerate(runner.instances)
    )

  def is_moving(self, instance: InstanceId) -> bool:
    """Whether moves of an instance's rBlocks wait for its steps."""
    if not self.pools:
      return False
    own = self._runner.instances.index(instance)
    is_waiting = any(each.instance == instance for each in self._waiting)
    return is_waiting or not self.pools[own].is_idle

  def books(self, instance: InstanceId) -> HostTier | None:
    """Makes the books of an instance's HOST tier; None if it has none."""
    if not self._config.host_blocks:
      return None
    return HostTier(
      overflow=self._rule,
      pool=BlockPool(instance, self._config.host_blocks, tier=Tier.HOST),
      costs=SwapCosts(
        block_bytes=self._runner.pool.block_bytes,
        link_bytes_per_s=self._config.host_link_bytes_per_s,
        recompute_tokens_per_s=self._config.recompute_tokens_per_s,
        doubling_tokens=self._runner.model.config.doubling_tokens,
      ),
    )

  def carry_out(
    self,
    instance: InstanceId,
    effect: SwapBlocks | OverflowBlocks | DropOverflow,
  ) -> None:
    """Does what an instance's manager asks for, as `advance` launches it.

    rBlocks of a preempted request are copied as soon as there is room for them,
    a slab at once, to where steps attend it; what was dropped is forgotten.
    """
    is_swap = isinstance(effect, SwapBlocks)
    if not (self.pools if is_swap else self.slabs):
      raise InvariantError(f"Instance {instance} has no HOST for {effect}.")
    own = self._runner.instances.index(instance)
    match effect:
      case SwapBlocks(to_tier=to_tier, swaps=swaps):
        copy = self.pools[own].copy(to_tier, swaps)
        self._copies.append(_Copying(instance, effect, copy))
      case OverflowBlocks():
        self._waiting.append(_Waiting(instance, effect))
      case DropOverflow(uid=uid):
        self.slabs[own].drop(uid)
        gone = [each for each in self._waiting if each.effect.uid == uid]
        self._waiting = [each for each in self._waiting if each not in gone]
        self._dropped += gone

  def held(self, instance: InstanceId, uid: RequestUid) -> Sequence[HeldSlab]:
    """What steps of a request attend in host memory, oldest first."""
    return self.slabs[self._runner.instances.index(instance)].slabs(uid)

  def advance(
    self,
    managers: Sequence[RManager],
    has_long_on: Callable[[InstanceId], bool],
  ) -> bool:
    """Launches what there is room for and tells what is done; never waits.

    Args:
      managers: Of the instances, in their order.
      has_long_on: Whether a long program is under way on an instance. Nothing
        is launched behind it: it would take up the link, and hold up others,
        only once that is over.

    Returns:
      Whether any rBlocks are or were on their way.
    """
    if not self._is_copying:
      return False
    for own, manager in enumerate(managers):
      is_behind = has_long_on(manager.instance)
      host = self.pools[own]
      if not host.is_idle:
        pool = host.advance(self._runner.pool.row(own), is_behind=is_behind)
        self._runner.pool.set_row(own, pool)
      if not is_behind:
        self._begin_waiting(manager.instance)
    for instance, effect in self._take_ended():
      manager = managers[self._runner.instances.index(instance)]
      if isinstance(effect, OverflowBlocks):
        manager.overflow.on_copied(effect)
      else:
        manager.swapping.on_swapped(effect)
    return True

  def _begin_waiting(self, instance: InstanceId) -> None:
    """Begins to copy the slabs of an instance that wait."""
    own = self._runner.instances.index(instance)
    for each in [each for each in self._waiting if each.instance == instance]:
      effect = each.effect
      self.pools[own].release(swap.dst_block for swap in effect.swaps)
      leaving = self.slabs[own].leave(
        self._runner.pool.row(own),
        effect.uid,
        effect.swaps,
        [swap.logical_id for swap in effect.swaps],
      )
      self._copies.append(_Copying(instance, effect, leaving))
      self._waiting.remove(each)  # Only now: what fails is tried again.

  def _take_ended(
    self,
  ) -> list[tuple[InstanceId, SwapBlocks | OverflowBlocks]]:
    """What was carried out, or is not wanted any more."""
    ended = [each for each in self._copies if each.copy.is_done]
    for each in ended:
      if isinstance(each.copy, LeavingSlab):
        own = self._runner.instances.index(each.instance)
        self.slabs[own].keep(each.copy)
    self._copies = [each for each in self._copies if each not in ended]
    dropped, self._dropped = self._dropped, []
    return [*dropped, *((instance, effect) for instance, effect, _ in ended)]

  @property
  def _is_copying(self) -> bool:
    return bool(self._copies or self._waiting or self._dropped)

  def warm_up(self) -> None:
    """Compiles the programs of the moves."""
    for own, host in enumerate(self.pools):
      pool = host.warm_up(self._runner.pool.row(own))
      self._runner.pool.set_row(own, pool)


def _overflow_rule(config: EngineConfig) -> OverflowRule:
  """Which requests keep rBlocks in host memory while they run."""
  cache = config.cache
  own_blocks = cache.capacity_tokens // cache.block_size
  in_host = cache.overflow_blocks - cache.kept_blocks
  missing = own_blocks - cache.kept_blocks
  if in_host <= missing:
    raise ConfigError(
      f"host_blocks must have room for more than {missing} rBlocks with"
      f" host_attention: a request could have {own_blocks} in its instance's"
      f" HBM, and keeps {cache.kept_blocks} there beside host memory; got"
      f" {cache.host_blocks}, room for {in_host}."
    )
  return OverflowRule(
    reachable_blocks=config.lending.reachable_blocks(
      own_blocks, config.num_instances
    ),
    kept_blocks=cache.kept_blocks,
    slab_blocks=cache.slab_blocks,
  )


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
