"""One gManager dies, the other leads; nothing of the dead one counts."""

import dataclasses
import itertools

import pytest

from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import Reserve
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  Heartbeat,
  MoveKvcache,
  RecallKvcache,
)
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster

UID = 7
_PERIOD_S = 1.0  # Of heartbeats. Sums of these times are exact.
_BEAT_S = 0.1875
_LEASE_S = 4 * _BEAT_S


class _Network:
  """Delivers all, and keeps a copy of what each gManager said."""

  def __init__(self):
    self.said = []
    self.cut = set()  # Pairs between which nothing gets through.

  def __call__(self, envelope):
    if envelope.sender in (GMANAGER, STANDBY):
      self.said.append(envelope)
    pair = (envelope.sender, envelope.receiver)
    return () if pair in self.cut else (envelope,)


@pytest.fixture
def network():
  return _Network()


@pytest.fixture
def cluster(network):
  cluster = FakeCluster(
    3,
    9,
    interceptor=network,
    has_standby=True,
    heartbeat_every_s=_PERIOD_S,
    leader_lease=_LEASE_S / _PERIOD_S,
  )
  _periods(cluster, 3)
  return cluster


def _beats(cluster, count):
  for _ in range(count):
    cluster.tick(_BEAT_S)
    cluster.settle()


def _periods(cluster, count):
  """Each instance sends so many heartbeats."""
  _beats(cluster, 6 * count)


def _live_out_the_lease(cluster):
  """Just so long that the leader's last word is as old as its lease."""
  _beats(cluster, 4)


def test_both_gmanagers_know_the_same(cluster):
  cluster.open(0, UID, 3 * BLOCK_SIZE)
  _periods(cluster, 1)

  leader, standby = cluster.gmanagers.values()
  assert leader.is_leader
  assert not standby.is_leader
  assert leader.view() == standby.view()
  assert len(leader.view().placements) == 1


def test_the_standby_serves_within_a_period_of_the_death(cluster):
  cluster.open(0, UID, 4 * BLOCK_SIZE)
  dead_s = cluster.now_s
  del cluster.gmanagers[GMANAGER]
  cluster.managers[0].borrow(UID, 2)
  cluster.settle()
  assert cluster.managers[0].phase(UID) is not Phase.IDLE  # Nobody answers.
  while cluster.managers[0].phase(UID) is not Phase.IDLE:
    assert cluster.now_s - dead_s < _PERIOD_S
    _beats(cluster, 1)

  assert cluster.managers[0].borrowed() == {1: 2}
  assert cluster.covers(0, UID, 4 * BLOCK_SIZE)
  assert cluster.gmanagers[STANDBY].epoch == 3


@pytest.mark.parametrize(
  "lending",
  [
    LendingConfig(),
    LendingConfig(heartbeat_every_s=1.0, leader_lease=0.75),
    LendingConfig(heartbeat_every_s=1.0, leader_lease=0.8),
  ],
)
def test_whenever_the_leader_dies_a_standby_soon_leads(lending):
  # Both are called each 16 steps, at any distance from each other; the last
  # word takes no time.
  step_s = lending.leader_beat_s / 16
  longest_s = 0.0
  for late, died in itertools.product(range(16), range(100, 116)):
    now = [0.0]
    leader, standby = (
      GManager(
        lending,
        lambda now=now: now[0],
        address=address,
        peers=[peer],
        is_leader=address == GMANAGER,
      )
      for address, peer in ((GMANAGER, STANDBY), (STANDBY, GMANAGER))
    )
    for number in range(300):
      now[0] = number * step_s
      if number % 16 == 0 and number < died:
        leader.tick()
        for word in leader.drain_messages():
          standby.on_message(word)
      if number % 16 == late:
        standby.tick()
      if standby.is_leader:
        break
    assert standby.is_leader
    assert number > died
    longest_s = max(longest_s, (number - died) * step_s)
  assert longest_s <= lending.heartbeat_every_s
  assert longest_s > lending.leader_lease_s


def test_no_word_of_the_dead_leader_counts_once_another_leads(cluster, network):
  cluster.open(0, UID, 4 * BLOCK_SIZE)
  cluster.managers[0].borrow(UID, 2)
  manager = cluster.managers[0]
  (question,) = [
    m for m in manager.drain_messages() if isinstance(m.body, CandidatesRequest)
  ]
  cluster.gmanager.on_message(question)
  (late,) = [
    m
    for m in cluster.gmanager.drain_messages()
    if isinstance(m.body, Candidates)
  ]
  assert [instance for instance, _ in late.body.rooms] == [1, 2]
  del cluster.gmanagers[GMANAGER]
  # All others are full by now, and only the new leader can know.
  for other in (1, 2):
    cluster.open(other, 10 + other, 8 * BLOCK_SIZE)
  _live_out_the_lease(cluster)
  network.said.clear()
  before = (manager.lendable_elsewhere(), manager.borrowed(), manager.lent())

  plans = (
    MoveKvcache(uid=UID, num_blocks=1, dst=1),
    RecallKvcache(uid=UID, num_blocks=1, src=1, freeze_s=1.0),
    ClusterStatus(lendable=9),
    FullHeartbeatRequest(),
  )
  for body in (late.body, *plans):
    manager.on_message(dataclasses.replace(late, body=body))

  assert (
    manager.lendable_elsewhere(),
    manager.borrowed(),
    manager.lent(),
  ) == before
  assert manager.drain_messages() == []
  assert manager.plans.num_declined == 0
  # The same words of the one that leads now do count.
  new = dataclasses.replace(late, sender=STANDBY, leader_epoch=3)
  for number, body in enumerate(plans, 1000):
    manager.on_message(dataclasses.replace(new, seq=number, body=body))
  assert manager.lendable_elsewhere() == 9
  assert manager.plans.num_declined == 1  # The move is under way by then.
  assert {type(m.body) for m in manager.drain_messages()} == {
    Reserve,
    Heartbeat,
  }


def test_what_the_dead_leader_allotted_ends_with_its_epoch(cluster):
  manager = cluster.managers[0]
  old = Envelope(
    sender=GMANAGER,
    receiver=0,
    incarnation=1,
    seq=100,
    body=ClusterStatus(lendable=9, allotted_to=5),
    leader_epoch=2,
  )
  manager.on_message(old)
  assert manager.allotted_to == 5
  # Whatever the new leader says first, it may have allotted that to another.
  first = dataclasses.replace(
    old, sender=STANDBY, seq=1, body=FullHeartbeatRequest(), leader_epoch=3
  )
  manager.on_message(first)
  assert manager.allotted_to == 0

  own = dataclasses.replace(first, seq=2, body=old.body)
  manager.on_message(own)
  manager.on_message(dataclasses.replace(first, seq=3))
  assert manager.allotted_to == 5  # Its own word is not undone by itself.


def test_a_question_to_the_dead_leader_is_put_to_the_new_one(cluster):
  cluster.open(0, UID, 4 * BLOCK_SIZE)
  del cluster.gmanagers[GMANAGER]
  assert cluster.managers[0].borrow(UID, 2)
  _live_out_the_lease(cluster)

  assert cluster.managers[0].borrowed() == {1: 2}


def test_a_leader_that_was_cut_off_steps_down_when_it_hears(cluster, network):
  everybody = (0, 1, 2)
  network.cut = {(GMANAGER, other) for other in (*everybody, STANDBY)} | {
    (other, GMANAGER) for other in (*everybody, STANDBY)
  }
  _periods(cluster, 15)
  leader, standby = cluster.gmanagers.values()
  assert leader.is_leader  # For all that it knows.
  assert standby.is_leader

  network.cut = set()
  _periods(cluster, 2)

  assert not leader.is_leader
  assert standby.is_leader
  assert leader.epoch == standby.epoch == 3
  _periods(cluster, 15)
  assert not leader.is_leader
  assert leader.view().lines == standby.view().lines


def test_while_the_leader_lives_the_standby_never_leads(cluster):
  _periods(cluster, 100)

  assert cluster.gmanagers[GMANAGER].is_leader
  assert not cluster.gmanagers[STANDBY].is_leader
  assert cluster.gmanagers[STANDBY].epoch == 2


def test_lost_heartbeats_are_made_up_for(cluster, network):
  cluster.open(0, UID, 3 * BLOCK_SIZE)
  network.cut = {(0, GMANAGER)}
  _periods(cluster, 1)  # The change that tells of the request is lost.
  network.cut = set()
  assert cluster.gmanager.view().placements == ()

  _periods(cluster, 1)

  assert [p.blocks.uid for p in cluster.gmanager.view().placements] == [UID]
