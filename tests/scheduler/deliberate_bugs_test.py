"""Deliberate bugs in the managers, one at a time: each of them is found.

`Place` lists them. A scenario passes without its bug and fails with it.
"""

import dataclasses

import pytest

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.fault_points import Place, no_fault
from infinite_llm.scheduler.lease_messages import (
  Commit,
  Grant,
  HostedEntry,
  Release,
  Reserve,
  ReserveReply,
)
from infinite_llm.types import Tier
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

_UID = 7
_CAP = 5


class _Wire:
  """Keeps all messages; loses some kinds of them and repeats others."""

  def __init__(self):
    self.log = []
    self.lost = ()
    self.repeated = ()

  def __call__(self, envelope):
    self.log.append(envelope)
    if isinstance(envelope.body, self.lost):
      return []
    return [envelope] * (1 + isinstance(envelope.body, self.repeated))

  def last(self, kind):
    return [m for m in self.log if isinstance(m.body, kind)][-1]


def _cluster(faults):
  """Two instances; six rBlocks of a request of instance 0, all at home."""
  wire = _Wire()
  cluster = FakeCluster(
    2,
    9,
    interceptor=wire,
    faults=faults,
    lease_s=11.0,
    max_lent_blocks=_CAP,
    host_blocks=7,
  )
  cluster.introduce()
  cluster.heartbeat()
  cluster.open(0, _UID, 6 * BLOCK_SIZE)
  return cluster, wire


def _lend(cluster, num_blocks=2):
  assert cluster.managers[0].move_kvcache(_UID, num_blocks, 1)
  cluster.settle()


def _lend_until(cluster, phase):
  manager = cluster.managers[0]
  assert manager.move_kvcache(_UID, 2, 1)
  for _ in until(lambda: manager.phase(_UID) is phase):
    cluster.carry()
    if manager.phase(_UID) is Phase.MOVING and phase is not Phase.MOVING:
      cluster.exchange()


def _pass(cluster, seconds):
  for _ in range(seconds):
    cluster.tick(1.0)
    cluster.settle()


def _a_release_of_an_earlier_lease_ends_nothing(cluster, wire):
  _lend(cluster)
  creditor = cluster.managers[1]
  reserve = wire.last(Reserve)
  release = Release(
    slot=reserve.body.slot, grants=(Grant(block_id=1, epoch=2),)
  )
  creditor.on_message(dataclasses.replace(reserve, seq=99, body=release))
  assert creditor.lent() == {0: 2}


def _the_cap_holds(cluster, wire):
  _lend(cluster, _CAP + 1)
  assert cluster.managers[1].lent() == {0: _CAP}


def _a_full_creditor_does_not_borrow(cluster, wire):
  cluster.open(1, 8, 8 * BLOCK_SIZE)
  _lend(cluster)
  assert not cluster.managers[1].is_borrowing()
  assert cluster.managers[1].borrowed() == {}


def _nothing_is_hosted_that_was_not_reserved(cluster, wire):
  _lend(cluster)
  creditor = cluster.managers[1]
  commit = wire.last(Commit)
  entry = HostedEntry(logical_id=5, grant=Grant(block_id=8, epoch=1))
  body = dataclasses.replace(commit.body, entries=(entry,))
  creditor.on_message(dataclasses.replace(commit, seq=99, body=body))
  hosted = {
    block_id
    for version in creditor.hosted.versions()
    for block_id in version.entries.block_ids.tolist()
  }
  assert hosted == {1, 2}


def _a_closed_request_leaves_nothing_behind(cluster, wire):
  _lend(cluster)
  cluster.managers[0].close(_UID)
  cluster.settle()
  cluster.check_agreement()
  cluster.check_empty()


def _debts_of_the_dead_vanish_within_a_lease(cluster, wire):
  _lend(cluster)
  cluster.restart(0)
  _pass(cluster, 11)
  assert cluster.managers[1].lent() == {}


def _a_repetition_reserves_nothing(cluster, wire):
  wire.repeated = (Reserve,)
  _lend(cluster)
  cluster.check_agreement()


def _grants_of_a_dead_creditor_are_not_believed(cluster, wire):
  wire.lost = (ReserveReply,)
  _lend(cluster)
  late = wire.last(ReserveReply)
  cluster.restart(1)
  cluster.introduce()
  owner = cluster.managers[0]
  assert owner.borrowed() == {}
  owner.on_message(late)
  assert owner.borrowed() == {}


def _requests_to_a_dead_creditor_are_not_executed(cluster, wire):
  _lend(cluster)
  cluster.managers[0].close(_UID)
  cluster.settle()
  cluster.restart(1)
  cluster.managers[1].on_message(wire.last(Reserve))
  cluster.settle()
  cluster.check_agreement()


def _what_a_restarted_creditor_held_is_lost(cluster, wire):
  _lend(cluster)
  cluster.restart(1)
  _pass(cluster, 1)
  assert _UID in cluster.managers[0].lost()
  cluster.check_agreement()


def _nothing_is_read_where_its_lease_may_have_ended(cluster, wire):
  _lend(cluster)
  owner, creditor = cluster.managers
  for _ in range(12):
    cluster.now_s += 1.0
    creditor.tick()
  assert creditor.lent() == {}
  assert not owner.is_readable(_UID)


def _a_step_can_be_proved_once_copies_are_named(cluster, wire):
  _lend_until(cluster, Phase.SWITCHED)
  assert cluster.covers(0, _UID, cluster.proved[_UID])


def _copies_that_were_not_proved_are_not_kept(cluster, wire):
  _lend_until(cluster, Phase.MOVING)
  for _ in until(lambda: bool(cluster.moves)):
    cluster.carry()
  cluster.lose_payload()
  cluster.settle()
  assert cluster.managers[0].is_readable(_UID)
  assert cluster.covers(0, _UID, cluster.proved[_UID])


def _a_request_may_end_while_its_blocks_move(cluster, wire):
  _lend_until(cluster, Phase.MOVING)
  cluster.managers[0].close(_UID)
  cluster.settle()
  cluster.check_empty()


def _after_a_recall_home_accepts_no_payload(cluster, wire):
  _lend(cluster)
  assert cluster.managers[0].recall_kvcache(_UID, 2, 1)
  cluster.settle()
  assert not any(cluster.devices[0].epoch)


def _what_the_dead_had_borrowed_is_free_once_it_is_back(cluster, wire):
  _lend(cluster)
  cluster.restart(0)
  cluster.introduce()
  assert cluster.managers[1].lent() == {}


def _what_is_being_copied_belongs_to_nobody_else(cluster, wire):
  manager = cluster.managers[0]
  cluster.is_copying = False
  assert manager.swapping.swap_out(_UID)
  cluster.settle()
  assert manager.counts().used == 6
  manager.swapping.drop(_UID)
  assert manager.counts().used == manager.counts(Tier.HOST).reserved == 6
  cluster.swap()
  cluster.check_empty()


def _nothing_stays_in_host_memory(cluster, wire):
  manager = cluster.managers[0]
  assert manager.swapping.swap_out(_UID)
  cluster.settle()
  assert manager.swapping.swap_in(_UID) == 6 * BLOCK_SIZE
  cluster.settle()
  manager.confirm(_UID, 6 * BLOCK_SIZE)
  manager.close(_UID)
  cluster.check_empty()


_SCENARIOS = {
  Place.EPOCH_UNCHECKED: _a_release_of_an_earlier_lease_ends_nothing,
  Place.CAP_IGNORED: _the_cap_holds,
  Place.REFUSAL: _a_full_creditor_does_not_borrow,
  Place.COMMIT_UNRESERVED: _nothing_is_hosted_that_was_not_reserved,
  Place.EPOCHS_KEPT: _a_closed_request_leaves_nothing_behind,
  Place.TABLE_KEPT: _a_closed_request_leaves_nothing_behind,
  Place.EXPIRY_SKIPPED: _debts_of_the_dead_vanish_within_a_lease,
  Place.REPETITION_EXECUTED: _a_repetition_reserves_nothing,
  Place.DEAD_HEARD: _grants_of_a_dead_creditor_are_not_believed,
  Place.MISDIRECTED_EXECUTED: _requests_to_a_dead_creditor_are_not_executed,
  Place.RESTART_OVERLOOKED: _what_a_restarted_creditor_held_is_lost,
  Place.TRUST_UNLIMITED: _nothing_is_read_where_its_lease_may_have_ended,
  Place.COMMIT_SKIPPED: _a_step_can_be_proved_once_copies_are_named,
  Place.PROOF_SKIPPED: _copies_that_were_not_proved_are_not_kept,
  Place.FREED_TWICE: _a_request_may_end_while_its_blocks_move,
  Place.RELEASE_FORGOTTEN: _a_closed_request_leaves_nothing_behind,
  Place.HOME_EPOCHS_KEPT: _after_a_recall_home_accepts_no_payload,
  Place.DEAD_DEBTS_KEPT: _what_the_dead_had_borrowed_is_free_once_it_is_back,
  Place.HOME_FREED_EARLY: _what_is_being_copied_belongs_to_nobody_else,
  Place.DROPPED_EARLY: _what_is_being_copied_belongs_to_nobody_else,
  Place.HOST_KEPT: _nothing_stays_in_host_memory,
}


class _Bug:
  """One deliberate bug; a refusing creditor borrows for its debtor instead."""

  def __init__(self, bug):
    self.bug = bug
    self.cluster: FakeCluster | None = None

  def __call__(self, place):
    if place == self.bug == Place.REFUSAL:
      assert self.cluster is not None
      assert self.cluster.managers[1].borrow(8, 1)
    return place == self.bug


@pytest.mark.parametrize("place", Place)
def test_the_scenario_of_each_bug_passes_without_it(place):
  _SCENARIOS[place](*_cluster(no_fault))


@pytest.mark.parametrize("place", Place)
def test_each_bug_is_found(place):
  bug = _Bug(place)
  cluster, wire = _cluster(bug)
  bug.cluster = cluster

  with pytest.raises((AssertionError, InvariantError)) as caught:
    _SCENARIOS[place](cluster, wire)

  assert "Not done after" not in str(caught.value)
