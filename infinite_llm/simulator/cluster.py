"""A simulated cluster: instances, gManagers, requests and their fates."""

import collections
import itertools
import random
from collections.abc import Callable

from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.messages import Address
from infinite_llm.scheduler.request import Request
from infinite_llm.scheduler.stalls import StandingAside
from infinite_llm.simulator.data_plane import DataPlane
from infinite_llm.simulator.fault_points import DeathError, FaultPoints
from infinite_llm.simulator.faults import NetworkFaults
from infinite_llm.simulator.gmanagers import ADDRESSES, GManagers
from infinite_llm.simulator.instance import Instance
from infinite_llm.simulator.invariants import (
  check_agreement,
  check_empty,
  check_ownership,
)
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.scenario import Scenario
from infinite_llm.simulator.trace import Observer
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.simulator.watch import World
from infinite_llm.types import FaultPoint, InstanceId

OUTSIDE: Address = -1
"""Address under which those wait who are no manager."""

_HOUSEKEEPING_S = 0.5
"""Seconds between two full checks."""

_STALL_S = 2.0
"""Seconds without any progress after which the youngest request gives way."""


class Cluster:
  """All of a simulated cluster, on one thread.

  Attributes:
    world: What the instances share.
    instances: Those that are up, and the last life of those that are not.
    gmanagers: The leading one and the standby.
    mishaps: What goes wrong inside the managers.
    accepted: Requests that were accepted and had not ended when they were last
      counted, by name; the last life of each.
    num_accepted: Requests that were ever accepted.
    num_migrated: Requests that went to another instance.
  """

  def __init__(
    self,
    scenario: Scenario,
    rng: random.Random,
    *,
    observer: Observer | None = None,
    note: Callable[[float, str], None] | None = None,
    faults: Callable[[Address], FaultPoint] | None = None,
  ):
    """Starts all instances and gManagers at time 0.

    Args:
      scenario: Sizes and troubles.
      rng: Decides all that happens by chance.
      observer: Hears of every message; None costs nothing.
      note: Hears of all else; None costs nothing.
      faults: Gives each manager its fault points; None has them answer as
        `Scenario.mishaps` says.
    """
    network = SimulatedNetwork(rng, scenario.network, observer)
    self.mishaps = FaultPoints(rng, scenario.mishaps)
    self.world = World(
      scenario=scenario,
      rng=rng,
      network=network,
      plane=DataPlane(
        scenario.num_instances,
        scenario.num_blocks,
        scenario.block_size,
        scenario.host_blocks,
      ),
      faults=faults or self.mishaps.at,
      note=note,
    )
    self.instances: list[Instance] = []
    self.accepted: dict[str, Request] = {}
    self.num_accepted = 0
    self.num_migrated = 0
    self._unheeded: collections.Counter[str] = collections.Counter()
    self._uids = itertools.count(1)
    self._aside = StandingAside()
    self._incarnations = [1] * scenario.num_instances
    self._journal: dict[InstanceId, list[Request]] = {}
    for number in range(scenario.num_instances):
      instance = self._instance(number)
      self.instances.append(instance)
      self.world.watches.append(instance.watch)
      network.register(number, instance.on_message)
    self.gmanagers = GManagers(self.world)
    for instance in self.instances:
      instance.start()

  @property
  def up(self) -> list[Instance]:
    """Instances that live."""
    return [instance for instance in self.instances if instance.is_up]

  @property
  def num_open(self) -> int:
    """Requests that were accepted and have not ended."""
    self.accepted = {
      name: request
      for name, request in self.accepted.items()
      if not request.status.is_finished
    }
    return len(self.accepted)

  @property
  def is_empty(self) -> bool:
    """Whether nobody holds anything, and nothing is under way.

    A late word of a dead leader makes a standby step down for a lease; that is
    waited for too.
    """
    return self.gmanagers.num_leaders == 1 and all(
      instance.is_quiet
      and instance.manager.counts().free == instance.manager.counts().total
      and not instance.manager.borrowed()
      and not instance.manager.swapping.counts().used
      for instance in self.instances
    )

  @property
  def unheeded(self) -> collections.Counter[str]:
    """What instances did not do that they were told, by why, in all lives."""
    return sum(map(_unheeded, self.up), self._unheeded)

  # Requests.

  def add_request(self, instance: Instance, prompt: int, output: int) -> None:
    """Has an instance accept a request.

    Args:
      instance: One that is up.
      prompt: Tokens of its prompt.
      output: Tokens that it is to have beside.
    """
    uid = next(self._uids)
    request = Request(
      uid=uid,
      request_id=f"request-{uid}",
      prompt_token_ids=tuple(range(prompt)),
      sampling=SamplingParams(max_tokens=output),
      arrival=uid,
      max_total_tokens=prompt + output,
    )
    self.world.tell(
      f"request {uid} with {prompt}+{output} tokens to {instance.number}"
    )
    self.accepted[request.request_id] = request
    self.num_accepted += 1
    instance.add(request)

  def abort(self, instance: Instance, request: Request) -> None:
    """Ends a request of an instance at somebody's wish."""
    self.world.tell(f"abort of request {request.uid} on {instance.number}")
    instance.abort(request.uid)

  # Life and death.

  def crash(self, number: InstanceId) -> None:
    """Takes an instance down, with all that it has."""
    instance = self.instances[number]
    self._unheeded += _unheeded(instance)
    self._journal[number] = list(instance.stop())
    self.world.network.crash(number)
    self.world.plane.reset(number)

  def restart(self, number: InstanceId) -> None:
    """Brings an instance back; what it had accepted begins anew."""
    self._incarnations[number] += 1
    instance = self._instance(number)
    self.instances[number] = instance
    self.world.watches[number] = instance.watch
    self.world.network.restart(number, instance.on_message)
    for lost in self._journal.pop(number):
      self._replay(lost, instance)
    instance.start()

  def revive(self, address: Address) -> None:
    """Brings somebody back, if it is down."""
    if not self.world.network.is_crashed(address):
      return
    if isinstance(address, int):
      self.restart(address)
    else:
      self.gmanagers.restart(address)

  def heal(self) -> None:
    """Everybody is up from now on, and every message arrives."""
    self.mishaps.end()
    network = self.world.network
    self.world.is_healed = True
    delays = network.faults
    self.world.settled_s = network.now_s + delays.max_delay_s + delays.late_s
    network.heal()
    network.faults = NetworkFaults()
    for address in (*range(len(self.instances)), *ADDRESSES):
      self.revive(address)

  # Time.

  def run_until(self, time_s: float) -> None:
    """Lets time pass, with the full checks that hold at any moment.

    Args:
      time_s: How late it is then.

    Raises:
      ViolationError: If something must not be as it is.
    """
    network = self.world.network
    while network.now_s < time_s:
      until_s = min(network.now_s + _HOUSEKEEPING_S, time_s)
      while network.now_s < until_s:
        try:
          network.run_until(until_s)
          self._break_stall()
        except DeathError as death:
          self._bury(death)
      check_ownership(self.instances, self.world.plane)

  # Checks.

  def check_quiescent(self) -> None:
    """What must hold when no request is left and all has been said.

    Raises:
      ViolationError: If it does not.
    """
    check_ownership(self.instances, self.world.plane)
    check_agreement(self.instances)
    check_empty(self.instances, self.world.plane)
    self.gmanagers.check_quiescent(self.instances)
    for name, request in self.accepted.items():
      if not request.status.is_finished:
        raise ViolationError(f"{name} never ended: {request.status}.")

  def _break_stall(self) -> None:
    """As the engine: requests may wait for each other's rBlocks for ever."""
    world = self.world
    self._let_others_back()
    if world.network.now_s - world.progress_s < _STALL_S:
      return
    world.progress_s = world.network.now_s
    running = [
      (request.arrival, request.uid, instance)
      for instance in self.up
      if not instance.has_flight
      for request in instance.batcher.running
    ]
    if len(running) > 1:
      _, uid, instance = max(running, key=lambda entry: entry[0])
      world.tell(f"stall: request {uid} on {instance.number} gives way")
      self._aside.add(uid, [other for _, other, _ in running])
      instance.batcher.preempt(uid)
      instance.requests[uid].stands_aside = True
      instance.settle()

  def _let_others_back(self) -> None:
    """Has requests that gave way run again, once somebody else has ended."""
    if not (awaited := self._aside.awaited):
      return
    open_ = {
      request.uid: request
      for request in self.accepted.values()
      if not request.status.is_finished
    }
    for ended in awaited - open_.keys():
      for uid in self._aside.ended(ended):
        if uid in open_:
          open_[uid].stands_aside = False

  def _bury(self, death: DeathError) -> None:
    """Takes down who died, to come back in time."""
    world, address = self.world, death.address
    world.tell(str(death))
    if isinstance(address, int):
      self.crash(address)
    else:
      self.gmanagers.crash(address)
    down_s = world.scenario.crash_s * world.rng.random()
    world.network.call_later(OUTSIDE, down_s, lambda: self.revive(address))

  def _replay(self, lost: Request, instance: Instance) -> None:
    """Has a request begin anew."""
    # A uid is never used twice in a lending group.
    replayed = Request(
      uid=next(self._uids),
      request_id=lost.request_id,
      prompt_token_ids=lost.prompt_token_ids,
      sampling=lost.sampling,
      arrival=lost.arrival,
      max_total_tokens=lost.max_total_tokens,
    )
    self.accepted[lost.request_id] = replayed
    instance.add(replayed)

  def _migrate(self, request: Request, number: InstanceId) -> None:
    """Has a request that ended for that run elsewhere, without its KV."""
    self.world.tell(f"request {request.uid} goes to {number}")
    self.num_migrated += 1
    if self.instances[number].is_up:
      self._replay(request, self.instances[number])
    else:
      self._journal[number].append(request)

  def _instance(self, number: InstanceId) -> Instance:
    return Instance(
      number, self._incarnations[number], self.world, self._migrate
    )


def _unheeded(instance: Instance) -> collections.Counter[str]:
  manager = instance.manager
  return manager.void + collections.Counter(
    refused=manager.refused.total(), declined=manager.plans.num_declined
  )
