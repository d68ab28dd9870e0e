"""The gManagers of a simulated cluster: one leads, another one stands by."""

from collections.abc import Sequence

from infinite_llm.distributed.transport.base import Handler
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Envelope,
  GManagerAddress,
)
from infinite_llm.scheduler.performance_model import PerformanceModel, Profile
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.simulator.instance import Instance
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.simulator.watch import World
from infinite_llm.types import Epoch

ADDRESSES: Sequence[GManagerAddress] = (GMANAGER, STANDBY)

# A batch of four is four times as fast as one of one, attention is cheap: so
# moving pays wherever somebody waits.
_PERFORMANCE = PerformanceModel(
  num_layers=1,
  work_per_token=1.0,
  batch_speed=Profile(at=(1, 4), per_s=(1, 4)),
  attention_speed=Profile(at=(1,), per_s=(1000,)),
)


class GManagers:
  """Both gManagers, with their ticks, crashes and starts.

  Attributes:
    up: Those that live, by address.
  """

  def __init__(self, world: World):
    """Starts both; the first one leads.

    Args:
      world: What it shares with the instances.
    """
    self.up: dict[GManagerAddress, GManager] = {}
    self._world = world
    self._incarnations = dict.fromkeys(ADDRESSES, 1)
    self._leader_of: dict[Epoch, tuple[GManagerAddress, int]] = {}
    for address in ADDRESSES:
      self._start(address, is_leader=address == GMANAGER)
      world.network.register(address, self._handler(address))
      self._wake(address)

  def crash(self, address: GManagerAddress) -> None:
    """Takes a gManager down, with all that it knows."""
    del self.up[address]
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
    self.up[address] = GManager(
      scenario.lending,
      self._world.network.clock(address),
      planning=PlanningConfig(
        block_size=scenario.block_size, performance=_PERFORMANCE
      ),
      address=address,
      peers=[other for other in ADDRESSES if other != address],
      incarnation=self._incarnations[address],
      is_leader=is_leader,
      num_instances=scenario.num_instances,
    )

  def _handler(self, address: GManagerAddress) -> Handler:
    def on_message(envelope: Envelope) -> None:
      self.up[address].on_message(envelope)
      self._settle(address)

    return on_message

  def _wake(self, address: GManagerAddress) -> None:
    def tick() -> None:
      self.up[address].tick()
      self._settle(address)
      self._wake(address)

    tick_s = self._world.scenario.tick_s
    self._world.network.call_later(address, tick_s, tick)

  def _settle(self, address: GManagerAddress) -> None:
    """Sends what a gManager says; nobody else may lead under its epoch."""
    gmanager = self.up[address]
    if gmanager.is_leader:
      leader = address, self._incarnations[address]
      known = self._leader_of.setdefault(gmanager.epoch, leader)
      if known != leader:
        raise ViolationError(
          f"Both {known} and {leader} lead under epoch {gmanager.epoch}."
        )
    for envelope in gmanager.drain_messages():
      self._world.network.send(envelope)
