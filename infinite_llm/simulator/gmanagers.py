"""The gManagers of a simulated cluster: one leads, another one stands by."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from infinite_llm.distributed.transport.base import Handler
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Envelope,
  GManagerAddress,
  Heartbeat,
  Leadership,
)
from infinite_llm.scheduler.performance_model import PerformanceModel, Profile
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.simulator.instance import Instance
from infinite_llm.simulator.nonsense import hand_over_nonsense
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.simulator.watch import World
from infinite_llm.types import Epoch, InstanceId

ADDRESSES: Sequence[GManagerAddress] = (GMANAGER, STANDBY)

# A batch of four is four times as fast as one of one, attention is cheap: so
# moving pays wherever somebody waits.
_PERFORMANCE = PerformanceModel(
  num_layers=1,
  work_per_token=1.0,
  batch_speed=Profile(at=(1, 4), per_s=(1, 4)),
  attention_speed=Profile(at=(1,), per_s=(1000,)),
)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Life:
  """One life of a gManager, and what it must have noticed of the leader.

  Times are those of its own clock.

  Attributes:
    gmanager: The gManager.
    clock: Its clock.
    leader_heard_s: When it last heard of whoever leads, or began to listen.
    heard_at_s: The true time of that.
    ticked_s: When it was last called to do what is due.
    num_nonsense: Messages that it had to refuse.
    told: Instances that have told it everything: incarnation and number of
      the newest such heartbeat, and when it came.
  """

  gmanager: GManager
  clock: Callable[[], float]
  leader_heard_s: float
  heard_at_s: float
  ticked_s: float
  num_nonsense: int = 0
  told: dict[InstanceId, tuple[int, int, float]] = dataclasses.field(
    default_factory=dict[InstanceId, tuple[int, int, float]]
  )

  def hear(self, envelope: Envelope) -> None:
    """Notes a heartbeat that says everything, if it is a newer one."""
    sender, body = envelope.sender, envelope.body
    name = envelope.incarnation, envelope.seq
    if (
      isinstance(sender, int)
      and isinstance(body, Heartbeat)
      and not body.is_change
      and name > self.told.get(sender, (0, 0, 0.0))[:2]
    ):
      self.told[sender] = (*name, self.clock())


class GManagers:
  """Both gManagers, with their ticks, crashes and starts.

  A standby must lead as soon as `leader_lease_s` have passed, by its own clock,
  since the last word that it heard of a leader, and not before. If a leader
  dies, a standby that lives leads within one heartbeat period, by the true
  time: of the death, or of the last word of the dead where that was still on
  its way. Where the standby's clock jumped meanwhile, it cannot know.

  Attributes:
    up: Those that live, by address.
    num_takeovers: How often a standby began to lead.
    num_deaths: Deaths of leaders that are held to this.
    longest_takeover_s: Longest of their times until a standby led.
  """

  def __init__(self, world: World):
    """Starts both; the first one leads.

    Args:
      world: What it shares with the instances.
    """
    self.num_takeovers = self.num_deaths = 0
    self.longest_takeover_s = 0.0
    self._died_s: float | None = None
    self._lives: dict[GManagerAddress, _Life] = {}
    self._world = world
    self._incarnations = dict.fromkeys(ADDRESSES, 1)
    self._leader_of: dict[Epoch, tuple[GManagerAddress, int]] = {}
    for address in ADDRESSES:
      self._start(address, is_leader=address == GMANAGER)
      world.network.register(address, self._handler(address))
      self._wake(address)

  @property
  def up(self) -> dict[GManagerAddress, GManager]:
    """Those that live, by address."""
    return {a: life.gmanager for a, life in self._lives.items()}

  @property
  def num_leaders(self) -> int:
    """How many of them lead, for all that they know."""
    return sum(life.gmanager.is_leader for life in self._lives.values())

  def crash(self, address: GManagerAddress) -> None:
    """Takes a gManager down, with all that it knows."""
    was_leader = self._lives.pop(address).gmanager.is_leader
    self._died_s = None
    if was_leader and self._lives and not self.num_leaders:
      self._died_s = self._world.network.now_s
    self._world.network.crash(address)

  def restart(self, address: GManagerAddress) -> None:
    """Brings a gManager back: it knows nothing, and stands by."""
    self._incarnations[address] += 1
    self._start(address, is_leader=False)
    self._world.network.restart(address, self._handler(address))
    self._wake(address)

  def check_quiescent(self, instances: Sequence[Instance]) -> None:
    """What must hold when all has been said.

    Raises:
      ViolationError: If not just one leads, or it does not know what all have.
    """
    leaders = [gmanager for gmanager in self.up.values() if gmanager.is_leader]
    if len(leaders) != 1:
      raise ViolationError(f"One gManager must lead; {len(leaders)} do.")
    for address, life in self._lives.items():
      refused = life.gmanager.refused
      if sum(refused.values()) != life.num_nonsense:
        raise ViolationError(
          f"The {address} refused messages of sane senders: {dict(refused)},"
          f" of which {life.num_nonsense} were not."
        )
    lines = {line.instance: line for line in leaders[0].view().lines}
    for instance in instances:
      line = lines.get(instance.number)
      counts = instance.manager.counts()
      lent = tuple(sorted(instance.manager.lent().items()))
      if line is None or (line.incarnation, line.free, line.debts) != (
        instance.incarnation,
        counts.free,
        lent,
      ):
        raise ViolationError(
          f"The ledger says {line} of instance {instance.number}, which has"
          f" {counts} and lent {lent}."
        )

  def _start(self, address: GManagerAddress, *, is_leader: bool) -> None:
    scenario = self._world.scenario
    clock = self._world.network.clock(address)
    gmanager = GManager(
      scenario.lending,
      clock,
      planning=PlanningConfig.of(
        scenario.lending, scenario.block_size, _PERFORMANCE
      ),
      address=address,
      peers=[other for other in ADDRESSES if other != address],
      incarnation=self._incarnations[address],
      is_leader=is_leader,
      num_instances=scenario.num_instances,
      faults=self._world.faults(address),
    )
    now_s = clock()
    self._lives[address] = _Life(
      gmanager=gmanager,
      clock=clock,
      leader_heard_s=now_s,
      heard_at_s=self._world.network.now_s,
      ticked_s=now_s,
    )

  def _handler(self, address: GManagerAddress) -> Handler:
    def on_message(envelope: Envelope) -> None:
      life = self._lives[address]
      if id(envelope) in self._world.nonsense:
        life.num_nonsense += 1
        hand_over_nonsense(life.gmanager, envelope)
        return
      before = life.gmanager.epoch
      life.gmanager.on_message(envelope)
      is_word = isinstance(envelope.body, Leadership)
      if life.gmanager.epoch > before or (
        is_word and envelope.leader_epoch == before
      ):
        life.leader_heard_s = life.clock()
        life.heard_at_s = self._world.network.now_s
      life.hear(envelope)
      self._settle(address)

    return on_message

  def _wake(self, address: GManagerAddress) -> None:
    def tick() -> None:
      life = self._lives[address]
      was_leader = life.gmanager.is_leader
      life.gmanager.tick()
      self._check_takeover(address, life, was_leader=was_leader)
      self._settle(address)
      self._wake(address)

    beat_s = self._world.scenario.lending.leader_beat_s
    self._world.network.call_later(address, beat_s, tick)

  def _check_takeover(
    self, address: GManagerAddress, life: _Life, *, was_leader: bool
  ) -> None:
    """A standby leads as soon as the leader's lease is over, and not before.

    Whoever was not called for half a lease has slept, and cannot tell.
    """
    lending = self._world.scenario.lending
    now_s, gmanager = life.clock(), life.gmanager
    since_s, life.ticked_s = now_s - life.ticked_s, now_s
    if since_s > lending.leader_lease_s / 2:
      life.leader_heard_s = now_s
    if was_leader:
      return
    over_s = now_s - life.leader_heard_s - lending.leader_lease_s
    if gmanager.is_leader != (over_s >= 0):
      raise ViolationError(
        f"The {address} {'leads' if gmanager.is_leader else 'stands by'}"
        f" {over_s:+.3f} s after the leader's lease."
      )
    if not gmanager.is_leader:
      return
    self.num_takeovers += 1
    self._check_death(address, life)
    known = {line.instance for line in gmanager.view().lines}
    expired_s = now_s - lending.expire_after_s
    told = {i for i, (_, _, s) in life.told.items() if s > expired_s}
    missing = told - known
    if missing:
      raise ViolationError(
        f"The {address} leads without knowing instances {sorted(missing)},"
        " which told it everything."
      )

  def _check_death(self, address: GManagerAddress, life: _Life) -> None:
    """If a leader died before, that was at most a heartbeat period ago."""
    died_s, self._died_s = self._died_s, None
    if died_s is None:
      return
    since_s = max(died_s, life.heard_at_s)
    if self._world.jumped_s.get(address, -math.inf) >= since_s:
      return
    took_s = self._world.network.now_s - since_s
    self.num_deaths += 1
    self.longest_takeover_s = max(self.longest_takeover_s, took_s)
    if took_s > self._world.scenario.lending.heartbeat_every_s:
      raise ViolationError(
        f"The {address} leads only {took_s:.3f} s after the leader's death."
      )

  def _settle(self, address: GManagerAddress) -> None:
    """Sends what a gManager says; nobody else may lead under its epoch."""
    gmanager = self._lives[address].gmanager
    if gmanager.is_leader:
      leader = address, self._incarnations[address]
      known = self._leader_of.setdefault(gmanager.epoch, leader)
      if known != leader:
        raise ViolationError(
          f"Both {known} and {leader} lead under epoch {gmanager.epoch}."
        )
    faults = self._world.faults(address)
    outgoing = gmanager.drain_messages()
    for envelope in outgoing:
      self._world.network.send(envelope)
      if len(outgoing) > 1:
        faults(Mishap.DEATH_WHILE_SENDING)
