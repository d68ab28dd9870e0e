"""Joins the managers of a lending group to its devices.

Managers decide and keep books; this module carries their messages, turns their
effects into programs, and tells them what the devices proved.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from infinite_llm.attention.dist_attention import SpillSlots
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.step_header import (
  GroupOrder,
  GroupWork,
  StepHeader,
)
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.engine.arrival_check import check_arrivals
from infinite_llm.engine.group_inputs import fill_payloads, fill_slots
from infinite_llm.engine.host_tier import HostTiers
from infinite_llm.engine.in_flight import IsReady, is_computed
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.pending_check import Asked, PendingCheck, names_of
from infinite_llm.engine.step_batch import CheckRow
from infinite_llm.engine.waiting_moves import WaitingMoves
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.rules import require
from infinite_llm.scheduler.effects import (
  DropOverflow,
  GrantEpochs,
  MoveBlocks,
  OverflowBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import Fetch, LeaseReply
from infinite_llm.scheduler.messages import GMANAGER, Envelope
from infinite_llm.scheduler.performance_model import load_performance_model
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.types import InstanceId, RequestUid

_POLICIES = ("borrow", "greedy", "static", "swap")
"""Policies that the engine carries out; the others ask for what it cannot."""

_BINDING = (*LeaseReply.__value__.__args__, Fetch)
"""Messages after which their receiver relies on the sender's devices."""

_MAX_ROUNDS = 1000
"""Rounds of messages between two programs; more are an endless conversation."""


class LendingGroup:
  """Managers, transport and data plane of this process's instances.

  Everything by instance is of these instances alone, in their order.

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
    order: GroupOrder,
    is_ready: IsReady = is_computed,
  ):
    """Registers all managers with the transport.

    Args:
      config: Sizes and rules.
      runner: The devices.
      clock: Monotonic seconds, for resends and heartbeats.
      transport: Carries messages; nobody else uses it.
      order: Agrees on group programs with other processes.
      is_ready: Tells whether a check is over.

    Raises:
      ConfigError: If the policy is one for the simulator only, or lacks a
        performance profile, or if the HOST pools do not fit.
    """
    policy, rule = config.lending.policy, f"one of {', '.join(_POLICIES)}"
    require(policy in _POLICIES, "policy", f"{rule} in an engine", policy)
    if policy == "swap" and not config.cache.host_blocks:
      raise ConfigError(
        "host_blocks must be at least 2 for policy 'swap', which swaps to them;"
        f" got {config.cache.host_blocks}."
      )
    profile = config.lending.performance_profile
    planning = PlanningConfig.of(
      config.lending,
      config.cache.block_size,
      load_performance_model(profile) if profile else None,
    )
    gmanager = GManager(
      config.lending,
      clock,
      planning=planning,
      num_instances=config.num_instances,
    )
    self._config = config
    self._runner = runner
    self._order = order
    self._is_ready = is_ready
    self.transport = transport
    self.host_tiers = HostTiers(config, runner)
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
      for instance in runner.instances
    ]
    for manager in self.managers:
      transport.register(manager.instance, self._noting_turns(manager))
    self._gmanagers = []
    if runner.instances.start == 0:
      transport.register(GMANAGER, gmanager.on_message)
      self._gmanagers.append(gmanager)
    self._installed = [manager.hosted.generation for manager in self.managers]
    self._moves = WaitingMoves(config, len(self.managers))
    # First turn in which an instance's creditors surely know what they said.
    self._first_turn = dict.fromkeys(runner.instances, 0)
    self._check: PendingCheck | None = None
    self.num_blocks_moved = 0
    self.num_unproved_moves = 0

  def tick(self) -> None:
    """Has managers do what is due, and report; to be called beside steps."""
    for manager in (*self.managers, *self._gmanagers):
      manager.tick()
    self._talk()

  def talk(self, has_long_on: Callable[[InstanceId], bool]) -> bool:
    """Lets managers talk, and tells them of a check that is over.

    Args:
      has_long_on: Whether a long program is under way on an instance: no move
        between the tiers is launched behind it.

    Returns:
      Whether rBlocks were proved, or are on their way between tiers; messages
      alone are no progress.
    """
    self._talk()
    has_gone_on = self.host_tiers.advance(self.managers, has_long_on)
    if self.has_answer:
      self._conclude()
      has_gone_on = True
    if has_gone_on:
      self._talk()
    return has_gone_on

  @property
  def num_refused(self) -> int:
    """Messages that managers refused, as no sane sender would send them."""
    managers = (*self.managers, *self._gmanagers)
    return sum(manager.refused.total() for manager in managers)

  @property
  def is_checking(self) -> bool:
    """Whether a coverage check is under way."""
    return self._check is not None

  @property
  def has_answer(self) -> bool:
    """Whether a coverage check is over that nobody was told of; no wait."""
    return self._check is not None and all(
      self._is_ready(proved) for proved in self._check.proved
    )

  def work(self) -> GroupWork:
    """What there is for the next turn, beside steps."""
    slots = self._config.lending.spill_slots
    return GroupWork(
      exchange=self._moves.exchange,
      check=self._check is None
      and any(
        manager.num_free_slots < slots and manager.unverified()
        for manager in self.managers
      ),
    )

  def may_join(self, instance: InstanceId, turn: StepHeader) -> bool:
    """Whether what an instance does in a turn is what its creditors expect.

    A creditor in another process may have launched its part of the turn before
    it did what it promised. Nothing wrong would come of it, since coverage and
    epochs are checked, but nothing right either.
    """
    return turn.number >= self._first_turn[instance]

  def move(
    self, turn: StepHeader, proved_tokens: Callable[[RequestUid], int]
  ) -> bool:
    """Moves rBlocks and has them checked, within a turn.

    Each agreed shift of the exchange runs once, with the agreed quota of each
    pair of instances, and at most one check, so that no step waits for a whole
    borrow. What does not fit is moved by the next turns, in order.

    Args:
      turn: What is to be launched.
      proved_tokens: How many tokens of a request are computed and proved.

    Returns:
      Whether rBlocks were moved or are being proved.
    """
    has_moved = self._exchange(turn)
    if has_moved:
      self._talk()
    return self._launch_check(turn, proved_tokens) or has_moved

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
    for own, manager in enumerate(self.managers):
      if self._installed[own] != manager.hosted.generation:
        self._installed[own] = manager.hosted.generation
        self._runner.set_hosted(manager.instance, manager.hosted.versions())

  def _slots(
    self, manager: RManager, rows: Mapping[RequestUid, int]
  ) -> SpillSlots:
    spills = ((row, manager.spill(uid)) for uid, row in rows.items())
    num_slots = self._config.lending.spill_slots
    return fill_slots(spills, self._config.num_instances, num_slots)

  def _talk(self) -> None:
    """Carries messages and applies effects until nobody has any."""
    for _ in range(_MAX_ROUNDS):
      self._send()
      has_heard = self.transport.deliver() > 0
      if not (self._apply_effects() or has_heard):
        return
    raise InvariantError(
      f"The managers talked for {_MAX_ROUNDS} rounds without an end."
    )

  def renew(self) -> None:
    """Has creditors know that their owners live, in the middle of a step.

    What they say waits: nothing changes that a step goes by.
    """
    for manager in self.managers:
      manager.renew()
    self._send()

  def _send(self) -> None:
    for sender in (*self.managers, *self._gmanagers):
      for envelope in sender.drain_messages():
        if self._order.is_shared:
          turn = self._order.next_number
          envelope = dataclasses.replace(envelope, turn=turn)
        self.transport.send(envelope)

  def _noting_turns(self, manager: RManager) -> Callable[[Envelope], None]:
    """What takes a manager's messages."""

    def receive(envelope: Envelope) -> None:
      if isinstance(envelope.body, _BINDING):
        instance = manager.instance
        first = self._first_turn[instance]
        self._first_turn[instance] = max(first, envelope.turn)
      manager.on_message(envelope)

    return receive

  def _apply_effects(self) -> bool:
    happened = False
    for own, manager in enumerate(self.managers):
      for effect in manager.drain_effects():
        happened = True
        match effect:
          case GrantEpochs(block_ids=block_ids, epochs=epochs):
            self._runner.grant_epochs(
              manager.instance, dict(zip(block_ids, epochs, strict=True))
            )
          case MoveBlocks(moves=moves):
            self._moves.add(own, moves)
          case SwapBlocks() | OverflowBlocks() | DropOverflow():
            self.host_tiers.carry_out(manager.instance, effect)
    return happened

  def _exchange(self, turn: StepHeader) -> bool:
    """Runs a turn's exchange with as many waiting moves as it takes.

    Whatever was launched is told before the next shift is: one that fails
    leaves its moves waiting.
    """
    for shift, quota in turn.work.exchange:
      sent = [
        self._moves.next(own, shift, quota)
        if self.may_join(manager.instance, turn)
        else ()
        for own, manager in enumerate(self.managers)
      ]
      payloads = [fill_payloads(mine, quota) for mine in sent]
      arrivals = self._runner.exchange(shift, payloads)
      for own, mine in enumerate(sent):
        self._moves.drop(own, mine)
        self.num_blocks_moved += len(mine)
        if mine:
          self.managers[own].on_exchanged(mine)
      check_arrivals(arrivals, [manager.pool for manager in self.managers])
    return bool(turn.work.exchange)

  def _launch_check(
    self, turn: StepHeader, proved_tokens: Callable[[RequestUid], int]
  ) -> bool:
    """Has the devices prove moved rBlocks, so that old copies can go."""
    uids = [
      manager.unverified()
      if self._check is None and self.may_join(manager.instance, turn)
      else ()
      for manager in self.managers
    ]
    if not (turn.work.check if turn.is_shared else any(uids)):
      return False
    self.install_tables()
    block_size = self._config.cache.block_size
    checks, slots, asked = [], [], []
    for manager, mine in zip(self.managers, uids, strict=True):
      rows = {uid: manager.slot(uid) for uid in mine}
      # Full rBlocks only: a step that failed may have filled the last one
      # further than the books say.
      checks.append(
        [
          CheckRow(
            row,
            manager.table(uid),
            proved_tokens(uid) // block_size * block_size,
          )
          for uid, row in rows.items()
        ]
      )
      slots.append(self._slots(manager, rows))
      asked.append(
        [
          Asked(uid=uid, slot=row, names=names_of(manager, uid))
          for uid, row in rows.items()
        ]
      )
    proved = self._runner.verify(checks, slots)
    if any(uids):
      self._check = PendingCheck(proved=proved, asked=asked)
    return True

  def _conclude(self) -> None:
    """Tells the managers what a check found."""
    check, self._check = self._check, None
    if check is None:
      return
    for manager, answers, mine in zip(
      self.managers, check.proved, check.asked, strict=True
    ):
      proved = np.asarray(answers)
      for asked in mine:
        is_open = asked.uid in manager.unverified()
        if is_open and names_of(manager, asked.uid) == asked.names:
          is_proved = bool(proved[asked.slot])
          self.num_unproved_moves += not is_proved
          manager.on_verified(asked.uid, is_proved)
