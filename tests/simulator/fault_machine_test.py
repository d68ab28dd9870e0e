"""Faults in any order over a simulated cluster; hypothesis shrinks failures."""

import dataclasses
import random

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.policies import POLICIES
from infinite_llm.simulator.cluster import Cluster
from infinite_llm.simulator.fault_simulation import drain
from infinite_llm.simulator.gmanagers import ADDRESSES
from infinite_llm.simulator.scenario import draw_scenario

_INSTANCES = 3


class FaultMachine(stateful.RuleBasedStateMachine):
  """Each rule is a fault, an order or some time; nothing may go wrong."""

  @stateful.initialize(
    seed=st.integers(0, 1000), policy=st.sampled_from(sorted(POLICIES))
  )
  def start(self, seed, policy):
    scenario = draw_scenario(random.Random(seed))
    scenario = dataclasses.replace(
      scenario,
      num_instances=_INSTANCES,
      lending=dataclasses.replace(scenario.lending, policy=policy),
      host_blocks=scenario.num_blocks,
      # Whoever dies in the midst of something would end a rule.
      mishaps={
        Mishap.ALLOCATION_FAILS: 0.1,
        Mishap.GRANT_FAILS: 0.1,
        Mishap.SWAP_FAILS: 0.1,
      },
    )
    self.cluster = Cluster(scenario, random.Random(seed))
    self.network = self.cluster.world.network

  def _instance(self, number):
    """An instance that is up; None if that one is not."""
    instance = self.cluster.instances[number]
    return instance if instance.is_up else None

  @stateful.rule(
    number=st.integers(0, _INSTANCES - 1),
    prompt=st.integers(1, 120),
    output=st.integers(1, 40),
  )
  def add_a_request(self, number, prompt, output):
    instance = self._instance(number)
    scenario = self.cluster.world.scenario
    most = scenario.reachable_blocks * scenario.block_size
    if instance and prompt + output <= most and self.cluster.num_open < 9:
      self.cluster.add_request(instance, prompt, output)

  @stateful.rule(seconds=st.sampled_from((0.01, 0.1, 0.5, 2.0)))
  def let_time_pass(self, seconds):
    self.cluster.run_until(self.network.now_s + seconds)

  @stateful.rule(number=st.integers(0, _INSTANCES - 1))
  def crash_or_restart(self, number):
    if self._instance(number):
      self.cluster.crash(number)
    else:
      self.cluster.restart(number)

  @stateful.rule(address=st.sampled_from(ADDRESSES))
  def crash_or_restart_a_gmanager(self, address):
    if self.network.is_crashed(address):
      self.cluster.gmanagers.restart(address)
    else:
      self.cluster.gmanagers.crash(address)

  @stateful.rule(
    one=st.sets(
      st.sampled_from((*ADDRESSES, *range(_INSTANCES))), min_size=1, max_size=4
    )
  )
  def part(self, one):
    everybody = {*ADDRESSES, *range(_INSTANCES)}
    self.network.partition(one, everybody - one)

  @stateful.rule()
  def end_partitions(self):
    self.network.heal()

  @stateful.rule(
    number=st.integers(0, _INSTANCES - 1), rate=st.sampled_from((0.96, 1, 1.04))
  )
  def skew_a_clock(self, number, rate):
    self.network.skew(number, rate=rate)

  @stateful.rule(
    data=st.data(),
    number=st.integers(0, _INSTANCES - 1),
    to=st.integers(1, _INSTANCES - 1),
    num_blocks=st.integers(1, 4),
  )
  def order_a_move(self, data, number, to, num_blocks):
    instance = self._instance(number)
    if instance and instance.batcher.running:
      uid = data.draw(st.sampled_from(instance.batcher.running)).uid
      dst = (number + to) % _INSTANCES
      instance.move(uid, num_blocks, dst)

  @stateful.rule(
    number=st.integers(0, _INSTANCES - 1), num_blocks=st.integers(1, 4)
  )
  def order_recalls(self, number, num_blocks):
    instance = self._instance(number)
    for request in instance.batcher.running if instance else ():
      for creditor in instance.manager.table(request.uid).creditors():
        instance.manager.recall_kvcache(request.uid, num_blocks, creditor)
    if instance:
      instance.settle()

  @stateful.rule(data=st.data(), number=st.integers(0, _INSTANCES - 1))
  def preempt_a_request(self, data, number):
    instance = self._instance(number)
    if instance and instance.batcher.running and not instance.has_flight:
      request = data.draw(st.sampled_from(instance.batcher.running))
      instance.batcher.preempt(request.uid)
      instance.settle()

  @stateful.rule(
    data=st.data(), number=st.integers(0, _INSTANCES - 1), is_host=st.booleans()
  )
  def spoil_an_rblock(self, data, number, is_host):
    plane = self.cluster.world.plane
    tags = (plane.hosts if is_host else plane.devices)[number].tag
    tags[data.draw(st.integers(1, len(tags) - 1))] = 0

  @stateful.rule(data=st.data(), number=st.integers(0, _INSTANCES - 1))
  def abort_a_request(self, data, number):
    instance = self._instance(number)
    if instance and instance.batcher.has_work:
      requests = instance.batcher.running + instance.batcher.waiting
      self.cluster.abort(instance, data.draw(st.sampled_from(requests)))

  def teardown(self):
    self.cluster.heal()
    drain(self.cluster)


TestFaultMachine = FaultMachine.TestCase
TestFaultMachine.settings = hypothesis.settings(
  max_examples=80,
  stateful_step_count=60,
)
