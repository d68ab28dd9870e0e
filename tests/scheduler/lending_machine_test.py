"""Borrowing over a network that loses, repeats and reorders every message."""

import collections

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from infinite_llm.scheduler.messages import GMANAGER
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster

_INSTANCES = 3
_BLOCKS = 9


class LendingMachine(stateful.RuleBasedStateMachine):
  """Each rule is one event; the books must be right after each of them."""

  def __init__(self):
    super().__init__()
    self.wire = []
    self.cluster = FakeCluster(
      _INSTANCES,
      _BLOCKS,
      interceptor=self._on_wire,
      spill_slots=2,
      max_lent_blocks=6,
      headroom_blocks=1,
    )
    self.last_uid = 0
    self.owner = {}

  def _on_wire(self, envelope):
    self.wire.append(envelope)
    return []

  def _hand_over(self, envelope):
    if envelope.receiver == GMANAGER:
      self.cluster.gmanager.on_message(envelope)
    else:
      self.cluster.managers[envelope.receiver].on_message(envelope)

  @stateful.initialize(
    num_tokens=st.lists(
      st.integers(0, _BLOCKS * BLOCK_SIZE // 2), min_size=2, max_size=3
    )
  )
  def begin_with_requests(self, num_tokens):
    for instance, count in enumerate(num_tokens):
      self._open(instance, count)
    self.run_a_round()

  @stateful.precondition(lambda self: len(self.owner) < 4)
  @stateful.rule(instance=st.integers(0, _INSTANCES - 1))
  def open_request(self, instance):
    self._open(instance, 0)

  def _open(self, instance, num_tokens):
    self.last_uid += 1
    self.owner[self.last_uid] = instance
    self.cluster.open(instance, self.last_uid, num_tokens)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data(), num_tokens=st.integers(1, 3 * BLOCK_SIZE))
  def compute_tokens(self, data, num_tokens):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    instance = self.owner[uid]
    manager = self.cluster.managers[instance]
    room = (
      manager.pool.num_free + manager.table(uid).num_blocks
    ) * BLOCK_SIZE - self.cluster.proved[uid]
    if manager.is_readable(uid) and num_tokens <= room:
      self.cluster.compute(instance, uid, num_tokens)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data(), num_blocks=st.integers(1, 4))
  def borrow_blocks(self, data, num_blocks):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    self.cluster.managers[self.owner[uid]].borrow(uid, num_blocks)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data())
  def fail_a_row(self, data):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    manager = self.cluster.managers[self.owner[uid]]
    if manager.is_readable(uid):
      manager.reconcile(uid)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data(), is_preempted=st.booleans())
  def close_request(self, data, is_preempted):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    self.cluster.managers[self.owner[uid]].close(uid)
    if is_preempted:  # The same uid begins anew while its leases still end.
      room = self.cluster.managers[self.owner[uid]].pool.num_free
      self.cluster.open(self.owner[uid], uid, room // 2 * BLOCK_SIZE)
    else:
      del self.owner[uid]

  @stateful.rule()
  def let_time_pass(self):
    self.cluster.tick()

  @stateful.precondition(lambda self: self.wire)
  @stateful.rule(data=st.data(), is_kept=st.booleans())
  def deliver_a_message(self, data, is_kept):
    index = data.draw(st.integers(0, len(self.wire) - 1))
    envelope = self.wire[index] if is_kept else self.wire.pop(index)
    self._hand_over(envelope)

  @stateful.rule()
  def deliver_all_messages(self):
    wire, self.wire = self.wire, []
    for envelope in wire:
      self._hand_over(envelope)

  @stateful.rule()
  def run_a_round(self):
    """As `LendingGroup.settle` does, but without the proof."""
    self.cluster.tick(0.2)
    for _ in range(2):
      self.cluster.carry()
      self.deliver_all_messages()
    self.cluster.carry()
    self.cluster.exchange()

  @stateful.precondition(lambda self: self.wire)
  @stateful.rule(data=st.data())
  def lose_a_message(self, data):
    self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

  @stateful.rule(quota=st.integers(1, 4))
  def exchange_payloads(self, quota):
    self.cluster.exchange(quota)

  @stateful.rule()
  def verify_moves(self):
    self.cluster.verify()

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data())
  def refute_moves(self, data):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    self.cluster.managers[self.owner[uid]].on_verified(uid, False)

  @stateful.invariant()
  def books_are_right(self):
    self.cluster.carry()  # Puts what managers say on the wire.
    self.cluster.check()
    self._check_that_nothing_is_shared()
    for uid, instance in self.owner.items():
      if self.cluster.managers[instance].is_readable(uid):
        assert self.cluster.covers(instance, uid, self.cluster.proved[uid])

  def _check_that_nothing_is_shared(self):
    named = collections.Counter()
    for uid, instance in self.owner.items():
      table = self.cluster.managers[instance].table(uid)
      for logical_id in range(table.num_blocks):
        location = table.location(logical_id)
        named[location.instance, location.block_id] += 1
    assert all(count == 1 for count in named.values())

  def teardown(self):
    for uid, instance in self.owner.items():
      self.cluster.managers[instance].close(uid)
    for _ in range(6):  # A reservation may still be asked for, then returned.
      self.cluster.tick()
      self.cluster.carry()
      self.deliver_all_messages()
      self.cluster.exchange()
    self.cluster.carry()
    self.deliver_all_messages()
    self.cluster.check_agreement()
    self.cluster.check_empty()


TestLendingMachine = LendingMachine.TestCase
TestLendingMachine.settings = hypothesis.settings(
  max_examples=80,
  stateful_step_count=60,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)
