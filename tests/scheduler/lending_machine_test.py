"""Lending over a network that loses, repeats and reorders every message.

Instances sleep, and begin anew with nothing of what they had. Requests leave
for host memory and come back, and their copies take time and may be lost.
"""

import collections

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from infinite_llm.cache.rblock import BlockState
from infinite_llm.scheduler.account import Phase, Reconcile
from infinite_llm.scheduler.fault_points import no_fault
from infinite_llm.scheduler.messages import GMANAGER
from infinite_llm.scheduler.swapping import Stage
from tests.scheduler.fake_cluster import (
  BLOCK_SIZE,
  EPOCHS_PER_INCARNATION,
  FakeCluster,
  until,
)

_INSTANCES = 3
_BLOCKS = 9
_HOST_BLOCKS = 6
_LEASE_S = 5.0


class LendingMachine(stateful.RuleBasedStateMachine):
  """Each rule is one event; the books must be right after each of them."""

  faults = staticmethod(no_fault)

  def __init__(self):
    super().__init__()
    self.wire = []
    self.borrowers = set()
    self.spoiled = set()
    self.cluster = FakeCluster(
      _INSTANCES,
      _BLOCKS,
      interceptor=self._on_wire,
      spill_slots=2,
      max_lent_blocks=6,
      headroom_blocks=1,
      lease_s=_LEASE_S,
      faults=self.faults,
      host_blocks=_HOST_BLOCKS,
    )
    self.last_uid = 0
    self.owner = {}
    self.swapped_out = {}
    self.lost_copies = set()

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
    ),
    swapped=st.tuples(st.booleans(), st.booleans(), st.booleans()),
  )
  def begin_with_requests(self, num_tokens, swapped):
    for instance, count in enumerate(num_tokens):
      self._open(instance, count)
    self.come_to_rest()
    for uid, leaves in zip(tuple(self.owner), swapped, strict=False):
      if leaves:
        self._swap_out(uid)
      else:
        self._move(uid, 2, 1)
    self.come_to_rest()

  @stateful.precondition(
    lambda self: len(self.owner) + len(self.swapped_out) < 4
  )
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
    is_possible = manager.is_readable(uid) and not manager.is_frozen
    if is_possible and num_tokens <= room and self._can_be_proved(uid):
      self.cluster.compute(instance, uid, num_tokens)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data(), num_blocks=st.integers(1, 4))
  def borrow_blocks(self, data, num_blocks):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    if self.cluster.managers[self.owner[uid]].borrow(uid, num_blocks):
      self.borrowers.add(uid)

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(
    data=st.data(), num_blocks=st.integers(1, 4), to=st.integers(1, 2)
  )
  def move_blocks(self, data, num_blocks, to):
    uid = data.draw(st.sampled_from(sorted(self.owner)))
    self._move(uid, num_blocks, to)

  def _move(self, uid, num_blocks, to):
    instance = self.owner[uid]
    dst = (instance + to) % _INSTANCES
    if self.cluster.managers[instance].move_kvcache(uid, num_blocks, dst):
      self.borrowers.add(uid)

  @stateful.precondition(lambda self: self._recallable())
  @stateful.rule(data=st.data(), num_blocks=st.integers(1, 4))
  def recall_blocks(self, data, num_blocks):
    uid, creditor = data.draw(st.sampled_from(self._recallable()))
    manager = self.cluster.managers[self.owner[uid]]
    is_full = manager.pool.num_free == 0
    assert manager.recall_kvcache(uid, num_blocks, creditor) is not is_full

  def _recallable(self):
    return [
      (uid, creditor)
      for uid, instance in sorted(self.owner.items())
      for creditor in self.cluster.managers[instance].table(uid).creditors()
      if self.cluster.managers[instance].is_readable(uid)
      and self.cluster.managers[instance].phase(uid) is Phase.IDLE
    ]

  @stateful.rule(
    instance=st.integers(0, _INSTANCES - 1), seconds=st.sampled_from((0.0, 1.0))
  )
  def freeze_an_instance(self, instance, seconds):
    self.cluster.managers[instance].plans.freeze(seconds)

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
    manager = self.cluster.managers[self.owner[uid]]
    manager.close(uid)
    if is_preempted:  # The same uid begins anew while its leases still end.
      room = 0 if manager.is_frozen else manager.pool.num_free
      self.lost_copies.discard(uid)
      self.cluster.open(self.owner[uid], uid, room // 2 * BLOCK_SIZE)
    else:
      del self.owner[uid]

  @stateful.precondition(lambda self: self.owner)
  @stateful.rule(data=st.data())
  def swap_a_request_out(self, data):
    self._swap_out(data.draw(st.sampled_from(sorted(self.owner))))

  def _swap_out(self, uid):
    manager = self.cluster.managers[self.owner[uid]]
    if manager.swapping.swap_out(uid):
      self.swapped_out[uid] = self.owner.pop(uid)

  @stateful.precondition(lambda self: self._entered())
  @stateful.rule(data=st.data())
  def swap_out_what_just_came_in(self, data):
    uid = data.draw(st.sampled_from(self._entered()))
    self._swap_out(uid)
    assert uid in self.swapped_out

  def _entered(self):
    return [
      uid
      for uid, instance in sorted(self.owner.items())
      if self.cluster.managers[instance].swapping.stage(uid) is not None
    ]

  @stateful.precondition(lambda self: self.swapped_out)
  @stateful.rule(data=st.data(), waits=st.booleans())
  def swap_a_request_in(self, data, waits):
    uid = data.draw(st.sampled_from(sorted(self.swapped_out)))
    self.cluster.carry()
    while waits and self.cluster.swap():
      pass
    manager = self.cluster.managers[self.swapped_out[uid]]
    num_tokens = manager.swapping.swap_in(uid)
    if num_tokens is not None:
      self.owner[uid] = self.swapped_out.pop(uid)
      self.cluster.proved[uid] = num_tokens

  @stateful.precondition(lambda self: self.swapped_out)
  @stateful.rule(data=st.data())
  def abort_a_swapped_request(self, data):
    uid = data.draw(st.sampled_from(sorted(self.swapped_out)))
    instance = self.swapped_out.pop(uid)
    assert not self.cluster.managers[instance].swapping.drop(uid)

  @stateful.precondition(lambda self: self.cluster.swaps)
  @stateful.rule()
  def copy_between_tiers(self):
    self.cluster.swap()

  @stateful.precondition(lambda self: self.cluster.swaps)
  @stateful.rule()
  def lose_a_copy(self):
    self.lost_copies.add(self.cluster.swaps[0][1].swaps[0].uid)
    self.cluster.swap(spoils=True)

  @stateful.rule(seconds=st.sampled_from((0.2, 1.0, 2.0)))
  def let_time_pass(self, seconds):
    self.cluster.tick(seconds)

  @stateful.rule(
    sleeper=st.integers(0, _INSTANCES - 1),
    seconds=st.sampled_from((1.0, _LEASE_S)),
  )
  def let_an_instance_sleep(self, sleeper, seconds):
    self.cluster.now_s += seconds
    for instance, manager in enumerate(self.cluster.managers):
      if instance != sleeper:
        manager.tick()

  @stateful.precondition(lambda self: max(self.cluster.incarnations) < 3)
  @stateful.rule(instance=st.integers(0, _INSTANCES - 1))
  def restart_an_instance(self, instance):
    self.cluster.restart(instance)
    for homes in (self.owner, self.swapped_out):
      for uid in [uid for uid, home in homes.items() if home == instance]:
        del homes[uid]

  @stateful.rule()
  def recompute_what_is_lost(self):
    for uid, instance in self.owner.items():
      manager = self.cluster.managers[instance]
      if uid in manager.lost():
        manager.close(uid)
        self.cluster.open(instance, uid, 0)

  @stateful.precondition(lambda self: self.lost_copies)
  @stateful.rule()
  def recompute_what_came_back_wrong(self):
    for uid in sorted(self.lost_copies & self.owner.keys()):
      instance = self.owner[uid]
      manager = self.cluster.managers[instance]
      if self._is_unproved(uid) and not self.cluster.covers(
        instance, uid, self.cluster.proved[uid]
      ):
        assert manager.reconcile(uid) is Reconcile.RECOMPUTE
        manager.close(uid)
        self.cluster.open(instance, uid, 0)
        self.lost_copies.remove(uid)

  def _is_unproved(self, uid):
    swapping = self.cluster.managers[self.owner[uid]].swapping
    return swapping.stage(uid) is Stage.UNPROVED

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
    self.cluster.swap()

  @stateful.rule()
  def come_to_rest(self):
    """All that needs no time happens, and what is due."""
    self.cluster.tick(0.2)
    for _ in until(lambda: not self._make_a_step()):
      pass

  def _make_a_step(self):
    happened = self.cluster.carry()
    happened |= bool(self.wire)
    self.deliver_all_messages()
    happened |= self.cluster.exchange()
    happened |= self.cluster.swap()
    return self.cluster.verify() or happened

  @stateful.precondition(lambda self: self.wire)
  @stateful.rule(data=st.data())
  def lose_a_message(self, data):
    self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

  @stateful.rule(quota=st.integers(1, 4))
  def exchange_payloads(self, quota):
    self.cluster.exchange(quota)

  @stateful.precondition(lambda self: self.cluster.moves)
  @stateful.rule()
  def lose_a_payload(self):
    self.spoiled.add(self.cluster.moves[0].uid)
    self.cluster.lose_payload()

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
    self._check_that_nobody_forwards()
    for uid, instance in self.owner.items():
      manager = self.cluster.managers[instance]
      if manager.is_readable(uid) and self._can_be_proved(uid):
        assert self.cluster.covers(instance, uid, self.cluster.proved[uid])
        self._check_that_its_leases_live(instance, uid)

  def _can_be_proved(self, uid):
    """Whether a step of a readable request cannot but be proved.

    It fails while it reads copies that were spoiled on their way, and while it
    reads an instance that began anew and has not been heard since.
    """
    if uid in self.lost_copies and self._is_unproved(uid):
      return False
    phase = self.cluster.managers[self.owner[uid]].phase(uid)
    is_spoiled = uid in self.spoiled and phase is Phase.SWITCHED
    return not is_spoiled and all(map(self._is_alive, self._locations(uid)))

  def _locations(self, uid):
    table = self.cluster.managers[self.owner[uid]].table(uid)
    return map(table.location, range(table.num_blocks))

  def _is_alive(self, location):
    """Whether the incarnation that granted an rBlock still lives."""
    incarnation = location.epoch // EPOCHS_PER_INCARNATION + 1
    return incarnation == self.cluster.incarnations[location.instance]

  def _check_that_its_leases_live(self, instance, uid):
    table = self.cluster.managers[instance].table(uid)
    for creditor in table.creditors():
      pool = self.cluster.managers[creditor].pool
      for _, location in table.hosted_entries(creditor):
        block = pool.block(location.block_id)
        assert (block.owner, block.uid) == (instance, uid)
        assert (block.epoch, block.state) == (
          location.epoch,
          BlockState.HOSTED,
        )

  def _check_that_nobody_forwards(self):
    """Who borrows was told to, and is not serving somebody else."""
    for uid, instance in self.owner.items():
      phase = self.cluster.managers[instance].phase(uid)
      if phase in (Phase.ASKING, Phase.RESERVING):
        assert uid in self.borrowers
      elif phase is Phase.IDLE:
        self.borrowers.discard(uid)

  def _check_that_nothing_is_shared(self):
    named = collections.Counter()
    for uid, instance in self.owner.items():
      # What is not readable may have ended, and belong to somebody else.
      is_readable = self.cluster.managers[instance].is_readable(uid)
      for location in self._locations(uid):
        is_held = is_readable or location.instance == instance
        if is_held and self._is_alive(location):
          named[location.instance, location.block_id] += 1
    assert all(count == 1 for count in named.values())

  def teardown(self):
    for uid, instance in self.swapped_out.items():
      self.cluster.managers[instance].swapping.drop(uid)
    for uid, instance in self.owner.items():
      self.cluster.managers[instance].close(uid)
    # A reservation may still be asked for, then returned; and leases of those
    # who are gone must end.
    for _ in range(12):
      self.cluster.tick()
      self.come_to_rest()
    self.cluster.check_agreement()
    self.cluster.check_empty()


TestLendingMachine = LendingMachine.TestCase
TestLendingMachine.settings = hypothesis.settings(
  max_examples=80,
  stateful_step_count=60,
)
