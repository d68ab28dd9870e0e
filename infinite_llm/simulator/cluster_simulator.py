"""A cluster by discrete events: real managers and batchers, times from a model.

Messages travel over the simulated network without faults, rBlocks over links of
a given speed, copies to host memory and back over others, steps take what the
cost model says. Instances joined by debts begin a step together, when all of
them are through with the last one, and end it with the slowest if any row of it
attends elsewhere. Devices are not there: what moved arrived intact.

Requests that managers hand out (`MigrateRequest`), which no engine does, go to
where they are to run, and their KV follows over the link in place of being
computed again.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import cast

from infinite_llm.errors import CapacityError, InvariantError
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.effects import (
  GrantEpochs,
  MigrateRequest,
  Move,
  MoveBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Envelope,
  RecallKvcache,
)
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.stalls import StandingAside, who_gives_up
from infinite_llm.simulator.cluster_config import ClusterConfig
from infinite_llm.simulator.cost_model import CostModel
from infinite_llm.simulator.faults import NetworkFaults
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.simulated_instance import (
  InstanceStep,
  SimulatedInstance,
)
from infinite_llm.simulator.simulation_result import (
  RequestRecord,
  SimulationResult,
)
from infinite_llm.simulator.stepping import StepGroups
from infinite_llm.simulator.traces import TraceRequest
from infinite_llm.types import InstanceId, RequestUid, Tier

type _Link = tuple[InstanceId, InstanceId | Tier]


class ClusterSimulator:
  """Runs one trace on one cluster.

  Attributes:
    network: Messages and time.
    instances: All instances.
    gmanager: The gManager.
    records: What became of each request so far.
  """

  def __init__(
    self, config: ClusterConfig, cost: CostModel, trace: Sequence[TraceRequest]
  ):
    """Makes a cluster at time 0.

    Args:
      config: The cluster.
      cost: How long everything takes.
      trace: Requests, by rising arrival.
    """
    self._config = config
    self._cost = cost
    lending = config.lending
    faults = NetworkFaults(
      min_delay_s=config.min_delay_s, max_delay_s=config.max_delay_s
    )
    self.network = SimulatedNetwork(random.Random(config.seed), faults)
    self.instances = [
      SimulatedInstance(instance, config, cost, self.network.clock(instance))
      for instance in range(config.num_instances)
    ]
    planning = config.planning(cost.performance)
    self.gmanager = GManager(
      lending, self.network.clock(GMANAGER), planning=planning
    )
    self.network.register(GMANAGER, self._on_gmanager_message)
    for instance in self.instances:
      self.network.register(instance.instance, self._on_message)
    self._steps = StepGroups(
      cost,
      self.network,
      self.instances,
      on_planned=self._after_plan,
      on_step_end=self._on_step_end,
    )
    self.records = [RequestRecord(request=request) for request in trace]
    self._record_of: dict[RequestUid, RequestRecord] = {}
    self._loads = [0] * config.num_instances
    self._uids = itertools.count(1)
    self._num_open = len(self.records)
    self._link_free_s: dict[_Link, float] = {}
    self._progress_s = 0.0
    self._num_moved = self._num_recalled = self._num_swapped = 0
    self._num_migrated = self._num_stalls = 0
    self._aside = StandingAside()
    self._lent_block_ticks = self._used_block_ticks = 0
    self._begin()

  @property
  def is_over(self) -> bool:
    """Whether all requests have ended, one way or another."""
    return self._num_open == 0

  def run(self) -> SimulationResult:
    """Runs until all requests have ended, or time is up.

    Returns:
      What was measured.

    Raises:
      InvariantError: If an instance's rBlocks are not all accounted for.
    """
    while not self.is_over and self.network.now_s < self._config.most_s:
      self.network.step()
    duration_s = self.network.now_s
    leaked = 0
    if self.is_over:
      # Creditors have yet to hear that the last requests are over.
      lending = self._config.lending
      round_s = lending.resend_after_s + lending.heartbeat_every_s
      self.network.run_until(duration_s + 5 * round_s)
      managers = [instance.manager for instance in self.instances]
      counts = [m.counts(tier) for m in managers for tier in Tier]
      leaked = sum(count.total - count.free for count in counts)
    self.check()
    return SimulationResult(
      records=self.records,
      duration_s=duration_s,
      instance_steps=self._steps.instance_steps,
      num_messages=self.network.num_sent,
      num_blocks_moved=self._num_moved,
      num_blocks_recalled=self._num_recalled,
      num_blocks_swapped=self._num_swapped,
      num_migrated=self._num_migrated,
      num_preempted=sum(i.batcher.num_preempted for i in self.instances),
      num_stalls=self._num_stalls,
      remote_share=self._lent_block_ticks / max(self._used_block_ticks, 1),
      num_blocks_leaked=leaked,
    )

  def check(self) -> None:
    """What must hold after every event.

    Raises:
      InvariantError: If an instance's rBlocks are not all accounted for.
    """
    for instance in self.instances:
      pool = instance.manager.pool
      if not pool.is_conserved:
        raise InvariantError(
          f"rBlocks of instance {instance.instance} must add up; got"
          f" {pool.counts()} and {len(pool.free_ids)} that can be had."
        )

  def _begin(self) -> None:
    for record in self.records:
      self.network.call_later(
        GMANAGER,
        record.request.arrival_s,
        lambda record=record: self._arrive(record),
      )
    every_s = self._config.lending.heartbeat_every_s
    for instance in self.instances:
      # Spread out: clusters have no common beat.
      first_s = every_s * instance.instance / len(self.instances)
      self.network.call_later(
        instance.instance, first_s, lambda it=instance: self._tick(it)
      )
    self.network.call_later(GMANAGER, every_s, self._tick_gmanager)

  # Requests.

  def _arrive(self, record: RequestRecord) -> None:
    """Gives a request to the instance whose requests have fewest tokens."""
    reachable = self._config.reachable_tokens
    if record.num_tokens > reachable:
      record.refused = str(
        CapacityError(
          f"The request needs room for {record.num_tokens} tokens, but all"
          f" reachable rBlocks hold {reachable}: policy"
          f" {self._config.lending.policy!r}."
        )
      )
      self._num_open -= 1
      return
    uid = next(self._uids)
    prompt = range(record.request.prompt_tokens)
    request = Request(
      uid=uid,
      request_id=f"request-{uid}",
      # The scheduler only asks how long it is, and a range takes no room.
      prompt_token_ids=cast("tuple[int, ...]", prompt),
      sampling=SamplingParams(max_tokens=record.request.output_tokens),
      arrival=uid,
      max_total_tokens=record.num_tokens,
    )
    self._record_of[uid] = record
    instance = self.instances[self._loads.index(min(self._loads))]
    self._loads[instance.instance] += record.num_tokens
    instance.add(request)
    self._steps.wake(instance)

  def _migrate(self, owner: SimulatedInstance, plan: MigrateRequest) -> None:
    """Has a request run elsewhere, and its KV follow."""
    request = owner.requests[plan.uid]
    num_tokens = request.num_computed_tokens
    owner.batcher.abort(plan.uid)
    owner.take_ended()
    record = self._record_of.pop(plan.uid)
    self._let_others_back(plan.uid)
    moved = dataclasses.replace(
      request,
      uid=next(self._uids),
      num_computed_tokens=0,
      status=RequestStatus.WAITING,
    )
    self._record_of[moved.uid] = record
    self._loads[owner.instance] -= record.num_tokens
    self._loads[plan.dst] += record.num_tokens
    target = self.instances[plan.dst]
    target.add(moved, following_tokens=num_tokens)
    self._num_migrated += 1
    self._steps.wake(target)

  def _take_ended(self, instance: SimulatedInstance) -> None:
    for request in instance.take_ended():
      record = self._record_of.pop(request.uid)
      self._loads[instance.instance] -= record.num_tokens
      if request.error is not None:
        record.error = str(request.error)
      self._num_open -= 1
      self._let_others_back(request.uid)

  def _let_others_back(self, ended: RequestUid) -> None:
    for uid in self._aside.ended(ended):
      instance = next(each for each in self.instances if uid in each.requests)
      instance.requests[uid].stands_aside = False
      self._steps.wake(instance)

  # Steps.

  def _after_plan(self, instance: SimulatedInstance) -> None:
    self._take_ended(instance)  # A plan may give a request up.
    self._pump(instance)

  def _on_step_end(
    self, instance: SimulatedInstance, step: InstanceStep, duration_s: float
  ) -> None:
    """Commits an instance's part of a step."""
    now_s = self._progress_s = self.network.now_s
    for request in instance.commit(step, duration_s):
      record = self._record_of[request.uid]
      if record.first_token_s is None:
        record.first_token_s = now_s
      if request.status.is_finished:
        record.finish_s = now_s
    self._take_ended(instance)
    self._pump(instance)

  # Managers.

  def _tick(self, instance: SimulatedInstance) -> None:
    instance.manager.tick()
    self._pump(instance)
    self._steps.wake(instance)
    every_s = self._config.lending.heartbeat_every_s
    self.network.call_later(
      instance.instance, every_s, lambda: self._tick(instance)
    )

  def _tick_gmanager(self) -> None:
    self.gmanager.tick()
    self._send_gmanager_messages()
    for instance in self.instances:
      counts = instance.manager.counts()
      self._lent_block_ticks += counts.hosted
      self._used_block_ticks += counts.hosted + counts.used
    if self._steps.num_busy or not any(i.has_work for i in self.instances):
      self._progress_s = self.network.now_s
    else:
      self._break_stall()
    every_s = self._config.lending.heartbeat_every_s
    self.network.call_later(GMANAGER, every_s, self._tick_gmanager)

  def _break_stall(self) -> None:
    """As the engine: the youngest gives way; one that is alone fails."""
    requests = sorted(
      (request for one in self.instances for request in one.requests.values()),
      key=lambda request: request.arrival,
    )
    running = [r.uid for r in requests if r.status is RequestStatus.RUNNING]
    waiting = [r.uid for r in requests if r.status is RequestStatus.WAITING]
    lending = self._config.lending
    round_s = max(lending.resend_after_s, lending.heartbeat_every_s)
    rounds = int((self.network.now_s - self._progress_s) / round_s)
    if (uid := who_gives_up(running, waiting, rounds)) is None:
      return
    self._progress_s = self.network.now_s
    self._num_stalls += 1
    instance = next(each for each in self.instances if uid in each.requests)
    if len(running) > 1:
      self._aside.add(uid, running)
      instance.batcher.preempt(uid)
      instance.requests[uid].stands_aside = True
    else:
      instance.batcher.fail(uid, CapacityError("Nobody gives rBlocks up."))
    self._take_ended(instance)
    self._pump(instance)

  def _on_message(self, envelope: Envelope) -> None:
    instance = self.instances[cast("InstanceId", envelope.receiver)]
    instance.manager.on_message(envelope)
    self._pump(instance)
    self._steps.wake(instance)

  def _on_gmanager_message(self, envelope: Envelope) -> None:
    self.gmanager.on_message(envelope)
    self._send_gmanager_messages()

  def _send_gmanager_messages(self) -> None:
    for envelope in self.gmanager.drain_messages():
      if self._config.has_dgfm or not isinstance(envelope.body, RecallKvcache):
        self.network.send(envelope)

  def _pump(self, instance: SimulatedInstance) -> None:
    """Sends what a manager has to say, and does what it asks for."""
    manager = instance.manager
    for uid in manager.unverified():
      manager.on_verified(uid, is_proved=True)
    for effect in manager.drain_effects():
      match effect:
        case MoveBlocks(moves=moves):
          self._move(instance, moves)
        case SwapBlocks():
          self._swap(instance, effect)
        case MigrateRequest():
          self._migrate(instance, effect)
        case GrantEpochs():  # What was granted is all that arrives.
          pass
        case _:
          raise InvariantError(f"No simulated request overflows; got {effect}.")
    for envelope in manager.drain_messages():
      self.network.send(envelope)

  def _move(self, instance: SimulatedInstance, moves: tuple[Move, ...]) -> None:
    """Sends rBlocks to another instance."""
    self._num_moved += len(moves)
    if moves[0].uid not in instance.requests:  # Only owners lend out.
      self._num_recalled += len(moves)
    self._copy(
      instance,
      moves[0].dst_instance,
      self._cost.move_s(len(moves) * self._config.block_size),
      lambda: instance.manager.on_exchanged(moves),
    )

  def _swap(self, instance: SimulatedInstance, effect: SwapBlocks) -> None:
    """Copies rBlocks to the other tier."""
    self._num_swapped += len(effect.swaps)
    self._copy(
      instance,
      effect.to_tier,
      self._cost.swap_s(len(effect.swaps) * self._config.block_size),
      lambda: instance.manager.swapping.on_swapped(effect),
    )

  def _copy(
    self,
    instance: SimulatedInstance,
    where: InstanceId | Tier,
    duration_s: float,
    on_copied: Callable[[], None],
  ) -> None:
    """Copies behind what is on the same link already."""
    link, now_s = (instance.instance, where), self.network.now_s
    end_s = max(now_s, self._link_free_s.get(link, 0.0)) + duration_s
    self._link_free_s[link] = end_s

    def arrive() -> None:
      self._progress_s = self.network.now_s
      on_copied()
      self._pump(instance)
      self._steps.wake(instance)

    self.network.call_later(instance.instance, end_s - now_s, arrive)
