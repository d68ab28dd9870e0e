"""Joins the managers of a lending group to its devices.

Managers decide and keep books; this module carries their messages, turns their
effects into programs, and tells them what the devices proved.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

from infinite_llm.attention.dist_attention import SpillSlots
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.engine.group_inputs import empty_slots, fill_payloads
from infinite_llm.engine.host_tier import HostTiers
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.step_batch import CheckRow
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.effects import (
  GrantEpochs,
  Move,
  MoveBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import GMANAGER
from infinite_llm.scheduler.performance_model import load_performance_model
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.types import RequestUid

_POLICIES = ("borrow", "greedy", "static")
"""Policies that the engine carries out; the others ask for what it cannot."""

_MAX_ROUNDS = 1000
"""Rounds of messages between two programs; more are an endless conversation."""


class LendingGroup:
  """Managers, transport and data plane of the instances of one JAX job.

  Attributes:
    managers: rManager of each instance.
    transport: Carries their messages.
    host_tiers: Their rBlocks in host memory.
    num_blocks_moved: rBlocks sent between instances so far.
    num_unproved_moves: Times that moved rBlocks of a request were not proved,
      so that it went back to the old copies.
  """

  def __init__(
    self,
    config: EngineConfig,
    runner: ModelRunner,
    clock: Callable[[], float],
    transport: Transport,
  ):
    """Registers all managers with the transport.

    Args:
      config: Sizes and rules.
      runner: The devices.
      clock: Monotonic seconds, for resends and heartbeats.
      transport: Carries messages; nobody else uses it.

    Raises:
      ConfigError: If the policy is one for the simulator only, or lacks a
        performance profile, or if the HOST pools do not fit.
    """
    if config.lending.policy not in _POLICIES:
      raise ConfigError(
        f"policy must be one of {', '.join(_POLICIES)} in an engine; got"
        f" {config.lending.policy!r}."
      )
    self._config = config
    self._runner = runner
    self.transport = transport
    self.host_tiers = HostTiers(config.cache, runner, config.num_instances)
    self.managers = [
      RManager(
        instance=instance,
        num_instances=config.num_instances,
        pool=BlockPool(instance, config.cache.num_blocks),
        block_size=config.cache.block_size,
        lending=config.lending,
        clock=clock,
        host=self.host_tiers.books(instance),
      )
      for instance in range(config.num_instances)
    ]
    profile = config.lending.performance_profile
    planning = PlanningConfig(
      block_size=config.cache.block_size,
      performance=profile and load_performance_model(profile),
    )
    self._gmanager = GManager(config.lending, clock, planning=planning)
    for instance, manager in enumerate(self.managers):
      transport.register(instance, manager.on_message)
    transport.register(GMANAGER, self._gmanager.on_message)
    self._installed = [manager.hosted.generation for manager in self.managers]
    self._moves: collections.deque[Move] = collections.deque()
    self.num_blocks_moved = 0
    self.num_unproved_moves = 0

  def settle(self, proved_tokens: Callable[[RequestUid], int]) -> bool:
    """Lets managers talk; moves rBlocks and checks them, within a budget.

    Between two steps at most one exchange runs, of `exchange_blocks` per pair
    of instances, and at most one check, so that no step waits for a whole
    borrow. What does not fit is moved by the next calls, in order.

    Args:
      proved_tokens: How many tokens of a request are computed and proved.

    Returns:
      Whether rBlocks were moved or proved, or are on their way between tiers;
      messages alone are no progress.
    """
    for manager in self.managers:
      manager.tick()
    self._gmanager.tick()
    self._talk()
    has_moved = self._exchange() | self._end_swaps()
    if has_moved:
      self._talk()
    has_verified = self._verify(proved_tokens)
    if has_verified:
      self._talk()
    return has_moved or has_verified

  def slots(self, rows: Sequence[Mapping[RequestUid, int]]) -> list[SpillSlots]:
    """Names the spill slots of a group program.

    Args:
      rows: For each instance, the step's row of each of its requests with
        rBlocks elsewhere.

    Returns:
      Spill slots of each instance.
    """
    return [
      self._slots(manager, mine)
      for manager, mine in zip(self.managers, rows, strict=True)
    ]

  def install_tables(self) -> None:
    """Installs hosted tables that changed since they were last installed."""
    for instance, manager in enumerate(self.managers):
      if self._installed[instance] != manager.hosted.generation:
        self._installed[instance] = manager.hosted.generation
        self._runner.set_hosted(instance, manager.hosted.versions())

  def _slots(
    self, manager: RManager, rows: Mapping[RequestUid, int]
  ) -> SpillSlots:
    slots = empty_slots(
      self._config.num_instances, self._config.lending.spill_slots
    )
    for uid, row in rows.items():
      spill = manager.spill(uid)
      if spill is None:
        continue
      slots.rows[spill.slot] = row
      slots.epoch[spill.slot] = spill.slot_epoch
      for holder, version in spill.versions.items():
        slots.versions[spill.slot, holder] = version
    return slots

  def _talk(self) -> None:
    """Carries messages and applies effects until nobody has any."""
    for _ in range(_MAX_ROUNDS):
      has_spoken = self._carry_messages()
      has_spoken |= self._apply_effects()
      if not has_spoken:
        return
    raise InvariantError(
      f"The managers talked for {_MAX_ROUNDS} rounds without an end."
    )

  def _carry_messages(self) -> bool:
    for sender in (*self.managers, self._gmanager):
      for envelope in sender.drain_messages():
        self.transport.send(envelope)
    return self.transport.deliver() > 0

  def _apply_effects(self) -> bool:
    happened = False
    for instance, manager in enumerate(self.managers):
      for effect in manager.drain_effects():
        happened = True
        match effect:
          case GrantEpochs(block_ids=block_ids, epochs=epochs):
            self._runner.grant_epochs(
              instance, dict(zip(block_ids, epochs, strict=True))
            )
          case MoveBlocks(moves=moves):
            self._moves.extend(moves)
          case SwapBlocks():
            self.host_tiers.begin(instance, effect)
    return happened

  def _end_swaps(self) -> bool:
    """Moves rBlocks between the tiers; whether any are or were on their way."""
    was_copying = self.host_tiers.is_copying
    for instance, effect in self.host_tiers.advance():
      self.managers[instance].swapping.on_swapped(effect)
    return was_copying

  def _exchange(self) -> bool:
    """Runs one exchange program with as many waiting moves as it takes."""
    if not self._moves:
      return False
    payloads, waiting = fill_payloads(
      self._moves,
      self._config.num_instances,
      self._config.lending.exchange_blocks,
    )
    held = set(waiting)
    sent = [move for move in self._moves if move not in held]
    self._moves = collections.deque(waiting)
    self._runner.exchange(payloads)
    self.num_blocks_moved += len(sent)
    for instance, manager in enumerate(self.managers):
      mine = tuple(move for move in sent if move.src_instance == instance)
      if mine:
        manager.on_exchanged(mine)
    return True

  def _verify(self, proved_tokens: Callable[[RequestUid], int]) -> bool:
    """Has the devices prove moved rBlocks, so that old copies can go."""
    uids = [manager.unverified() for manager in self.managers]
    if not any(uids):
      return False
    self.install_tables()
    block_size = self._config.cache.block_size
    checks = []
    slots = []
    for manager, mine in zip(self.managers, uids, strict=True):
      mine_checked = []
      rows = {}
      for uid in mine:
        slot = manager.slot(uid)
        rows[uid] = slot
        # Full rBlocks only: a step that failed may have filled the last one
        # further than the books say.
        tokens = proved_tokens(uid) // block_size * block_size
        mine_checked.append(CheckRow(slot, manager.table(uid), tokens))
      checks.append(mine_checked)
      slots.append(self._slots(manager, rows))
    proved = self._runner.verify(checks, slots)
    for instance, mine in enumerate(uids):
      manager = self.managers[instance]
      for uid in mine:
        is_proved = bool(proved[instance, manager.slot(uid)])
        self.num_unproved_moves += not is_proved
        manager.on_verified(uid, is_proved)
    return True
