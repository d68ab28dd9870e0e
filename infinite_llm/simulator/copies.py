"""Copies between the tiers of one simulated instance."""

from collections.abc import Callable

from infinite_llm.scheduler.effects import OverflowBlocks, SwapBlocks
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.simulator.watch import World
from infinite_llm.types import RequestUid, Tier


class Copies:
  """Those under way: they end some time soon, in any order, or are lost."""

  def __init__(
    self,
    manager: RManager,
    world: World,
    wake: Callable[[float, Callable[[], None]], None],
    settle: Callable[[], None],
  ):
    """Starts with none.

    Args:
      manager: Whose rBlocks they are.
      world: What its instance shares with the others.
      wake: Has something done in so many seconds, if the instance lives.
      settle: To be called when the manager heard of something.
    """
    self._manager = manager
    self._world = world
    self._wake = wake
    self._settle = settle
    self._under_way: list[SwapBlocks | OverflowBlocks] = []

  def __bool__(self) -> bool:
    """Whether any is under way."""
    return bool(self._under_way)

  @property
  def uids(self) -> frozenset[RequestUid]:
    """Requests that have any under way."""
    return frozenset(copy.swaps[0].uid for copy in self._under_way)

  def begin(self, copy: SwapBlocks | OverflowBlocks) -> None:
    """Begins one."""
    self._under_way.append(copy)
    delay_s = self._world.scenario.copy_s * self._world.rng.random()
    self._wake(delay_s, lambda: self._end(copy))

  def clear(self) -> None:
    """Forgets all, as their instance crashed."""
    self._under_way.clear()

  def _end(self, copy: SwapBlocks | OverflowBlocks) -> None:
    world = self._world
    self._under_way.remove(copy)
    is_overflow = isinstance(copy, OverflowBlocks)
    to_tier = Tier.HOST if is_overflow else copy.to_tier
    self._check_ends(copy, to_tier)
    is_lost = not world.is_healed and (
      world.rng.random() < world.scenario.copy_lost
    )
    world.num_copies_lost += is_lost
    plane, instance = world.plane, self._manager.instance
    plane.swap(instance, copy.swaps, to_tier, is_lost=is_lost)
    world.progress_s = world.network.now_s
    if is_overflow:
      world.num_slabs += 1
      self._manager.overflow.on_copied(copy)
    else:
      self._manager.swapping.on_swapped(copy)
    self._settle()

  def _check_ends(
    self, copy: SwapBlocks | OverflowBlocks, to_tier: Tier
  ) -> None:
    """Until one is acknowledged, neither end is given to anybody else."""
    manager = self._manager
    pools = [manager.pool, manager.swapping.host_pool]
    if to_tier is Tier.HBM:
      pools.reverse()
    for one in copy.swaps:
      ends = zip(pools, (one.src_block, one.dst_block), strict=True)
      for pool, block_id in ends:
        block = pool.block(block_id)
        if (block.owner, block.uid) != (manager.instance, one.uid):
          raise ViolationError(
            f"A copy of request {one.uid} to {to_tier.name} is under way on"
            f" instance {manager.instance}, but its {pool.tier.name} rBlock is"
            f" {block}."
          )
