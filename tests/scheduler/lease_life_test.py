"""Leases in a group: who notices their end, and what happens then."""

import dataclasses

import pytest

from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.lease_messages import (
  Commit,
  Introduction,
  Renew,
  Renewed,
  Reserve,
  ReserveReply,
  Sync,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
)
from infinite_llm.scheduler.rmanager import Reconcile
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

UID = 7
_LEASE_S = 11.0  # trusted for 10 seconds


class Wire:
  """Loses the messages between instances of `cut` pairs, and keeps a log."""

  def __init__(self):
    self.log = []
    self.cut = set()

  def __call__(self, envelope):
    pair = (envelope.sender, envelope.receiver)
    if pair in self.cut:
      return []
    self.log.append(envelope)
    return [envelope]

  def bodies(self, *types):
    return [m.body for m in self.log if isinstance(m.body, types)]

  def separate(self, one, other):
    self.cut |= {(one, other), (other, one)}


@pytest.fixture
def wire():
  return Wire()


@pytest.fixture
def cluster(wire):
  """Two instances; six rBlocks of a request, the first two of them lent."""
  cluster = FakeCluster(2, 9, interceptor=wire, lease_s=_LEASE_S)
  cluster.introduce()
  cluster.heartbeat()
  cluster.open(0, UID, 6 * BLOCK_SIZE)
  assert cluster.managers[0].borrow(UID, 2)
  cluster.settle()
  return cluster


def _pass(cluster, seconds):
  """Lets time pass in steps of a second, with all that happens meanwhile."""
  for _ in range(seconds):
    cluster.tick(1.0)
    cluster.settle()


def _borrow_until(cluster, phase):
  manager = cluster.managers[0]
  assert manager.borrow(UID, 2)
  for _ in until(lambda: manager.phase(UID) is phase):
    cluster.carry()
    if manager.phase(UID) is Phase.MOVING and phase is not Phase.MOVING:
      cluster.exchange()


def _is_covered(cluster):
  return cluster.covers(0, UID, cluster.proved[UID])


class TestRenewal:
  def test_leases_live_for_as_long_as_their_owner(self, cluster, wire):
    wire.log.clear()
    _pass(cluster, 3)

    assert [(m.sender, m.receiver) for m in wire.log if m.receiver == 1] == [
      (0, 1),
      (GMANAGER, 1),
    ] * 3
    sent_s = [renew.sent_s for renew in wire.bodies(Renew)]
    assert [renewed.sent_s for renewed in wire.bodies(Renewed)] == sent_s
    _pass(cluster, 40)
    assert cluster.managers[1].lent() == {0: 2}
    assert cluster.managers[0].is_readable(UID)
    assert _is_covered(cluster)

  def test_nobody_is_told_who_holds_nothing(self, cluster, wire):
    cluster.managers[0].close(UID)
    cluster.settle()
    wire.log.clear()
    _pass(cluster, 2)

    assert wire.bodies(Renew) == []

  def test_any_message_renews(self, cluster, wire):
    """Renewals are lost; a reservation for another request gets through."""
    owner, creditor = cluster.managers
    cluster.open(0, 8, BLOCK_SIZE)
    wire.separate(0, 1)
    _pass(cluster, 8)
    wire.cut.clear()
    assert owner.borrow(8, 1)
    cluster.settle()
    wire.separate(0, 1)
    _pass(cluster, 9)

    assert creditor.lent() == {0: 3}
    assert owner.is_readable(UID)


class TestExpiry:
  def test_a_silent_owner_loses_leases_tables_and_epochs(self, cluster, wire):
    creditor = cluster.managers[1]
    assert cluster.devices[1].epoch[1:3] == [1, 2]
    wire.separate(0, 1)
    _pass(cluster, 10)
    assert creditor.lent() == {0: 2}
    _pass(cluster, 2)

    assert creditor.lent() == {}
    assert creditor.counts().free == 8
    assert not any(cluster.devices[1].epoch)
    assert creditor.hosted.versions() == ()

  def test_the_owner_stops_reading_before_the_creditor_gives_up(
    self, cluster, wire
  ):
    owner, creditor = cluster.managers
    wire.separate(0, 1)
    readable = []
    for _ in range(13):
      readable.append((owner.is_readable(UID), bool(creditor.lent())))
      _pass(cluster, 1)

    assert (False, True) in readable
    assert (True, False) not in readable
    assert readable[-1] == (False, False)

  @pytest.mark.parametrize(("seconds", "num_syncs"), [(12, 1), (25, 2)])
  def test_leases_that_outlived_a_partition_are_read_again_after_a_sync(
    self, cluster, wire, seconds, num_syncs
  ):
    """If the answer to the first sync is too old, a second one follows."""
    owner = cluster.managers[0]
    wire.cut = {(1, 0)}  # the owner is heard, but hears nothing
    _pass(cluster, seconds)
    assert not owner.is_readable(UID)
    assert owner.phase(UID) is Phase.SYNCING
    wire.cut.clear()
    wire.log.clear()
    _pass(cluster, 1)

    assert len(wire.bodies(Sync)) == num_syncs
    assert owner.is_readable(UID)
    assert UID not in owner.lost()
    assert _is_covered(cluster)

  def test_leases_that_ended_in_a_partition_make_the_request_recompute(
    self, cluster, wire
  ):
    owner = cluster.managers[0]
    wire.separate(0, 1)
    _pass(cluster, 13)
    wire.cut.clear()
    _pass(cluster, 2)

    assert UID in owner.lost()
    assert not owner.is_readable(UID)
    assert owner.reconcile(UID) is Reconcile.RECOMPUTE
    owner.close(UID)
    cluster.settle()
    cluster.check_agreement()
    cluster.check_empty()

  def test_a_creditor_that_slept_ends_nothing(self, cluster):
    owner, creditor = cluster.managers
    cluster.tick(100.0)  # everybody slept

    assert creditor.lent() == {0: 2}
    assert not owner.is_readable(UID)
    cluster.settle()
    assert owner.is_readable(UID)
    assert UID not in owner.lost()
    assert _is_covered(cluster)

  def test_an_owner_that_slept_alone_finds_out(self, cluster):
    owner, creditor = cluster.managers
    for _ in range(12):
      cluster.now_s += 1.0
      creditor.tick()
    assert creditor.lent() == {}
    assert not owner.is_readable(UID)
    _pass(cluster, 1)

    assert UID in owner.lost()

  @pytest.mark.parametrize(
    "phase",
    [Phase.RESERVING, Phase.MOVING, Phase.COMMITTING, Phase.SWITCHED],
  )
  def test_a_borrow_survives_the_end_of_its_leases_in_any_phase(
    self, cluster, wire, phase
  ):
    owner, creditor = cluster.managers
    _borrow_until(cluster, phase)
    wire.separate(0, 1)
    for _ in range(13):
      cluster.tick(1.0)
      for _ in until(lambda: not cluster.carry()):
        pass
      cluster.check()
    assert creditor.lent() == {}
    wire.cut.clear()
    _pass(cluster, 3)

    assert owner.phase(UID) is Phase.IDLE
    assert UID in owner.lost()
    owner.close(UID)
    _pass(cluster, 2)
    cluster.check_agreement()
    cluster.check_empty()

  def test_what_a_lease_held_can_be_lent_again_at_once(self, cluster, wire):
    owner, creditor = cluster.managers
    wire.separate(0, 1)
    _pass(cluster, 12)
    cluster.open(1, 8, 8 * BLOCK_SIZE)
    wire.cut.clear()
    _pass(cluster, 2)

    assert UID in owner.lost()
    assert cluster.covers(1, 8, 8 * BLOCK_SIZE)
    owner.close(UID)
    _pass(cluster, 1)
    assert creditor.counts().used == 8
    assert cluster.covers(1, 8, 8 * BLOCK_SIZE)


class TestRestart:
  def test_a_new_incarnation_of_the_owner_ends_the_leases_of_the_last(
    self, cluster
  ):
    creditor = cluster.managers[1]
    cluster.restart(0)
    _pass(cluster, 1)
    assert creditor.lent() == {0: 2}  # nothing was heard of it yet
    cluster.open(0, 8, 4 * BLOCK_SIZE)
    assert cluster.managers[0].borrow(8, 3)
    cluster.settle()

    assert creditor.lent() == {0: 3}
    assert cluster.covers(0, 8, 4 * BLOCK_SIZE)
    cluster.check_agreement()

  def test_a_dead_owner_is_forgotten_within_a_lease(self, cluster):
    cluster.restart(0)
    _pass(cluster, 11)

    assert cluster.managers[1].lent() == {}

  def test_late_messages_of_a_dead_incarnation_change_nothing(
    self, cluster, wire
  ):
    creditor = cluster.managers[1]
    old = [m for m in wire.log if m.receiver == 1 and m.sender == 0]
    cluster.restart(0)
    cluster.introduce()
    assert creditor.lent() == {}
    generation = creditor.hosted.generation
    for envelope in old:
      creditor.on_message(envelope)

    assert creditor.drain_messages() == []
    assert creditor.lent() == {}
    assert creditor.hosted.generation == generation

  def test_a_restarted_creditor_makes_the_request_recompute(self, cluster):
    owner = cluster.managers[0]
    cluster.restart(1)
    assert owner.is_readable(UID)  # not known yet; coverage would fail
    assert not _is_covered(cluster)
    _pass(cluster, 1)

    assert UID in owner.lost()
    assert owner.borrowed() == {}
    owner.close(UID)
    cluster.settle()
    cluster.check_empty()

  def test_a_request_meant_for_the_dead_incarnation_is_not_executed(
    self, cluster, wire
  ):
    (reserve,) = [m for m in wire.log if isinstance(m.body, Reserve)]
    (commit,) = [m for m in wire.log if isinstance(m.body, Commit)]
    cluster.restart(1)
    creditor = cluster.managers[1]
    creditor.on_message(reserve)
    creditor.on_message(commit)

    assert [m.body for m in creditor.drain_messages()] == [Introduction()] * 2
    assert creditor.lent() == {}

  def test_an_answer_of_the_dead_incarnation_is_not_believed(
    self, cluster, wire
  ):
    owner = cluster.managers[0]
    assert owner.borrow(UID, 2)
    wire.cut = {(1, 0)}
    cluster.settle()
    # Its reservation was answered, but the answer is late.
    late = ReserveReply(grants=())
    (asked,) = [m for m in wire.log if isinstance(m.body, Reserve)][1:]
    wire.cut.clear()
    cluster.restart(1)
    _pass(cluster, 1)
    assert owner.phase(UID) is Phase.IDLE
    before = owner.borrowed()
    owner.on_message(
      dataclasses.replace(
        asked, sender=1, receiver=0, body=late, meant_for=0, responder=1
      )
    )

    assert owner.borrowed() == before
    cluster.check_agreement()

  @pytest.mark.parametrize(
    "phase",
    [
      Phase.ASKING,
      Phase.RESERVING,
      Phase.MOVING,
      Phase.COMMITTING,
      Phase.SWITCHED,
    ],
  )
  def test_a_first_borrow_from_a_creditor_that_restarts_costs_no_kv(
    self, wire, phase
  ):
    cluster = FakeCluster(2, 9, interceptor=wire)
    cluster.introduce()
    cluster.heartbeat()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    owner = cluster.managers[0]
    _borrow_until(cluster, phase)
    cluster.restart(1)
    for _ in range(3):
      cluster.tick(1.0)
      for _ in until(lambda: not (cluster.carry() or cluster.exchange())):
        pass
    cluster.settle()

    assert owner.phase(UID) is Phase.IDLE
    assert UID not in owner.lost()
    assert _is_covered(cluster)
    cluster.check_agreement()
    owner.close(UID)
    cluster.settle()
    cluster.check_empty()

  def test_a_request_ends_although_its_creditor_restarts(self, cluster, wire):
    owner = cluster.managers[0]
    wire.separate(0, 1)
    owner.close(UID)
    _pass(cluster, 1)
    assert owner.num_free_slots == 3
    cluster.restart(1)
    wire.cut.clear()
    _pass(cluster, 1)

    cluster.check_empty()

  def test_a_restart_during_a_sync_ends_it(self, cluster):
    owner = cluster.managers[0]
    assert owner.reconcile(UID) is Reconcile.RETRY
    cluster.restart(1)
    _pass(cluster, 1)

    assert owner.phase(UID) is Phase.IDLE
    assert UID in owner.lost()


def test_strangers_are_introduced_before_anything_is_executed(wire):
  cluster = FakeCluster(2, 9, interceptor=wire)
  cluster.heartbeat()
  cluster.open(0, UID, 2 * BLOCK_SIZE)
  assert cluster.managers[0].borrow(UID, 1)
  cluster.settle()

  assert [
    (type(m.body), m.seq, m.meant_for, m.responder)
    for m in wire.log
    if GMANAGER not in (m.sender, m.receiver)
  ][:4] == [
    (Reserve, 4, 0, 0),
    (Introduction, 4, 0, 1),
    (Reserve, 4, 1, 0),
    (ReserveReply, 4, 0, 1),
  ]
  assert cluster.managers[0].borrowed() == {1: 1}
