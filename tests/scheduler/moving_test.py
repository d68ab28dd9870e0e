"""Moves that somebody names: to one creditor, and home again."""

import pytest

from infinite_llm.cache.rblock import BlockState, Location
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.effects import (
  GrantEpochs,
  MigrateRequest,
  Move,
  MoveBlocks,
)
from infinite_llm.scheduler.lease_messages import (
  Fetch,
  FetchedEntry,
  FetchReply,
  Grant,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
  SlotName,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Envelope,
  MoveKvcache,
  RecallKvcache,
)
from infinite_llm.scheduler.rmanager import Reconcile
from infinite_llm.types import PoolCounts
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

UID = 7
_SLOT = SlotName(slot=0, epoch=1)


class Log:
  """Notes all messages between instances, and may lose some kinds."""

  def __init__(self):
    self.bodies = []
    self.lost = ()

  def __call__(self, envelope):
    if GMANAGER not in (envelope.sender, envelope.receiver):
      self.bodies.append(envelope.body)
    return [] if isinstance(envelope.body, self.lost) else [envelope]


@pytest.fixture
def log():
  return Log()


@pytest.fixture
def cluster(log):
  """Three instances; six rBlocks of a request, logical 0 to 3 at instance 1.

  At home: logical 4 in block 5, logical 5 in block 6; 1 to 4 are free again.
  """
  cluster = FakeCluster(3, 9, interceptor=log)
  cluster.introduce()
  cluster.heartbeat()
  cluster.open(0, UID, 6 * BLOCK_SIZE)
  assert cluster.managers[0].move_kvcache(UID, 4, 1)
  cluster.settle()
  log.bodies.clear()
  return cluster


def _recall_until(cluster, phase, num_blocks=2):
  manager = cluster.managers[0]
  assert manager.recall_kvcache(UID, num_blocks, 1)
  for _ in until(lambda: manager.phase(UID) is phase):
    if cluster.carry():
      continue
    if manager.phase(UID) is Phase.SWITCHED:
      cluster.verify()
    else:
      cluster.exchange()


def _is_covered(cluster):
  return cluster.covers(0, UID, cluster.proved[UID])


class TestMove:
  def test_only_the_named_creditor_is_asked(self, log):
    cluster = FakeCluster(3, 9, interceptor=log)
    cluster.introduce()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    log.bodies.clear()
    manager = cluster.managers[0]
    assert manager.move_kvcache(UID, 2, 2)  # nobody's room is known
    assert manager.phase(UID) is Phase.RESERVING
    cluster.settle()

    assert manager.borrowed() == {2: 2}
    assert log.bodies[0] == Reserve(uid=UID, slot=_SLOT, num_blocks=2)
    assert _is_covered(cluster)

  def test_a_refusal_ends_it_and_says_nothing_of_others(self, cluster, log):
    manager = cluster.managers[0]
    cluster.open(2, 8, 8 * BLOCK_SIZE)
    cluster.heartbeat()
    log.bodies.clear()
    assert manager.move_kvcache(UID, 1, 2)
    cluster.settle()

    assert log.bodies == [
      Reserve(uid=UID, slot=_SLOT, num_blocks=1),
      ReserveReply(grants=()),
    ]
    assert manager.phase(UID) is Phase.IDLE
    assert manager.borrowed() == {1: 4}
    assert manager.borrow(UID, 1)  # instance 1 still has room

  def test_a_full_creditor_takes_what_fits_and_never_borrows(self, cluster):
    manager = cluster.managers[0]
    cluster.open(2, 8, 7 * BLOCK_SIZE)
    cluster.heartbeat()
    assert manager.move_kvcache(UID, 2, 2)
    cluster.settle()

    assert manager.borrowed() == {1: 4, 2: 1}
    assert cluster.managers[2].borrowed() == {}
    assert not cluster.managers[2].is_borrowing()

  def test_the_cap_holds(self):
    cluster = FakeCluster(2, 9, max_lent_blocks=3)
    cluster.introduce()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    assert cluster.managers[0].move_kvcache(UID, 5, 1)
    cluster.settle()

    assert cluster.managers[1].lent() == {0: 3}

  def test_a_busy_request_cannot_be_moved(self, cluster):
    manager = cluster.managers[0]
    assert manager.move_kvcache(UID, 1, 2)
    assert not manager.move_kvcache(UID, 1, 2)
    assert not manager.recall_kvcache(UID, 1, 1)

  @pytest.mark.parametrize("peer", [0, 3, -1])
  def test_a_peer_must_be_another_instance(self, cluster, peer):
    manager = cluster.managers[0]
    with pytest.raises(InvariantError, match=rf"dst must .* got {peer} on"):
      manager.move_kvcache(UID, 1, peer)
    with pytest.raises(InvariantError, match=rf"src must .* got {peer} on"):
      manager.recall_kvcache(UID, 1, peer)


class TestRecall:
  def test_the_newest_blocks_there_come_home(self, cluster):
    manager, creditor, _ = cluster.managers
    table = manager.table(UID)
    assert manager.recall_kvcache(UID, 2, 1)
    cluster.settle()

    # Logical 2 and 3 lie in the lowest blocks that were free at home.
    assert table.location(2) == Location(instance=0, block_id=1, epoch=7)
    assert table.location(3) == Location(instance=0, block_id=2, epoch=8)
    assert [n for n, _ in table.hosted_entries(1)] == [0, 1]
    assert manager.phase(UID) is Phase.IDLE
    assert manager.borrowed() == {1: 2}
    assert manager.counts() == PoolCounts(
      used=4, free=4, hosted=0, reserved=0, total=8
    )
    assert creditor.counts().hosted == 2
    assert manager.spill(UID).versions == {1: 2}
    assert not any(cluster.devices[0].epoch)
    assert _is_covered(cluster)

  def test_what_was_refused_for_a_recall_can_be_lent_at_once(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 1, 1)
    (grant,) = manager.drain_effects()
    (home,) = grant.block_ids
    manager.close(UID)  # rBlock `home` is free, payloads for it are refused
    reserve = Envelope(
      sender=2,
      receiver=0,
      incarnation=1,
      seq=99,
      body=Reserve(uid=8, slot=SlotName(slot=0, epoch=1), num_blocks=8),
      meant_for=1,
    )
    manager.on_message(reserve)

    epochs = {}
    for effect in manager.drain_effects():
      epochs |= dict(zip(effect.block_ids, effect.epochs, strict=True))
    assert manager.lent() == {2: 8}
    assert epochs[home] == manager.pool.block(home).epoch != 0

  def test_the_messages_and_effects_of_a_recall_are_these(self, cluster, log):
    manager, creditor, _ = cluster.managers
    table = manager.table(UID)
    src_tag = table.tag(3, BLOCK_SIZE)
    assert manager.recall_kvcache(UID, 1, 1)
    assert manager.drain_effects() == [GrantEpochs(block_ids=(1,), epochs=(7,))]
    cluster.devices[0].epoch[1] = 7
    for envelope in manager.drain_messages():
      cluster.transport.send(envelope)
    cluster.transport.deliver()
    (effect,) = creditor.drain_effects()
    assert creditor.drain_messages() == []  # the answer comes later
    (move,) = effect.moves
    assert effect == MoveBlocks(
      moves=(
        Move(
          uid=UID,
          logical_id=3,
          src_instance=1,
          src_block=4,
          src_tag=src_tag,
          dst_instance=0,
          dst_block=1,
          dst_epoch=7,
          dst_tag=move.dst_tag,
        ),
      )
    )
    cluster.moves.append(move)
    cluster.settle()

    at_creditor = Grant(block_id=4, epoch=4)
    assert log.bodies == [
      Fetch(
        uid=UID,
        slot=_SLOT,
        entries=(
          FetchedEntry(
            logical_id=3,
            grant=at_creditor,
            home=Grant(block_id=1, epoch=7),
          ),
        ),
      ),
      FetchReply(table_version=1),
      Release(slot=_SLOT, grants=(at_creditor,)),
      ReleaseReply(table_version=2),
    ]
    assert table.tag(3, BLOCK_SIZE) == move.dst_tag

  def test_a_request_that_came_home_has_no_slot_any_more(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 4, 1)
    cluster.settle()

    assert manager.spill(UID) is None
    assert manager.num_free_slots == 4
    assert cluster.managers[1].lent() == {}
    assert _is_covered(cluster)
    assert manager.move_kvcache(UID, 2, 2)  # and may leave again
    cluster.settle()
    assert manager.spill(UID).slot_epoch == 2
    assert _is_covered(cluster)

  def test_no_more_comes_home_than_there_is_room(self, cluster):
    manager = cluster.managers[0]
    cluster.open(0, 8, 3 * BLOCK_SIZE)
    assert manager.recall_kvcache(UID, 4, 1)
    cluster.settle()
    assert manager.borrowed() == {1: 1}
    assert not manager.recall_kvcache(UID, 4, 1)
    assert not manager.recall_kvcache(UID, 4, 2)  # nothing is there

  def test_a_step_can_be_proved_in_every_phase_but_the_last(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 2, 1)
    phases = {}
    for _ in until(lambda: manager.phase(UID) is Phase.IDLE):
      phases[manager.phase(UID)] = manager.is_readable(UID)
      if manager.is_readable(UID):
        assert _is_covered(cluster)
      if not cluster.carry() and not cluster.exchange():
        cluster.verify()

    # While the release is answered, the creditor's new version is not known.
    assert phases == {
      Phase.FETCHING: True,
      Phase.SWITCHED: True,
      Phase.RETURNING: False,
    }

  def test_the_creditors_copies_stay_until_those_at_home_are_proved(
    self, cluster
  ):
    _recall_until(cluster, Phase.SWITCHED)

    assert cluster.managers[1].lent() == {0: 4}
    assert cluster.managers[0].unverified() == (UID,)
    assert cluster.managers[0].pool.block(1).state is BlockState.RESERVED

  def test_payloads_may_take_several_exchanges(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 3, 1)
    for _ in until(lambda: bool(cluster.moves)):
      cluster.carry()
    for _ in range(2):
      cluster.exchange(quota=1)
      cluster.carry()
      assert manager.phase(UID) is Phase.FETCHING
    cluster.exchange(quota=1)
    cluster.carry()

    assert manager.phase(UID) is Phase.SWITCHED

  def test_copies_that_are_not_proved_are_dropped(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 2, 1)
    for _ in until(lambda: bool(cluster.moves)):
      cluster.carry()
    cluster.devices[0].epoch[1] = 0  # the first payload is refused
    cluster.settle()

    assert manager.phase(UID) is Phase.IDLE
    assert manager.borrowed() == {1: 4}
    assert manager.counts().used == 2
    assert not any(cluster.devices[0].epoch)
    assert manager.is_readable(UID)
    assert _is_covered(cluster)
    assert manager.recall_kvcache(UID, 2, 1)  # may be tried again
    cluster.settle()
    assert manager.borrowed() == {1: 2}

  def test_a_failed_row_undoes_an_unproved_recall_first(self, cluster):
    manager = cluster.managers[0]
    _recall_until(cluster, Phase.SWITCHED)

    assert manager.reconcile(UID) is Reconcile.RETRY

    assert [n for n, _ in manager.table(UID).hosted_entries(1)] == [0, 1, 2, 3]
    cluster.settle()
    assert manager.is_readable(UID)
    assert _is_covered(cluster)

  @pytest.mark.parametrize(
    "phase", [Phase.FETCHING, Phase.SWITCHED, Phase.RETURNING]
  )
  def test_a_request_may_end_in_any_phase(self, cluster, phase):
    _recall_until(cluster, phase)
    cluster.managers[0].close(UID)

    assert cluster.managers[0].counts().free == 8
    cluster.settle()
    cluster.check_agreement()
    cluster.check_empty()

  def test_a_payload_for_a_request_that_ended_is_refused(self, cluster):
    manager = cluster.managers[0]
    assert manager.recall_kvcache(UID, 2, 1)
    for _ in until(lambda: bool(cluster.moves)):
      cluster.carry()
    manager.close(UID)
    cluster.open(0, 8, 8 * BLOCK_SIZE)  # takes the places of the copies
    for _ in until(lambda: not cluster.carry()):
      pass
    cluster.exchange()

    assert cluster.refused_payloads == 2
    assert cluster.covers(0, 8, 8 * BLOCK_SIZE)

  @pytest.mark.parametrize("lost", [Fetch, FetchReply, Release, ReleaseReply])
  def test_a_lost_message_is_made_up_for(self, cluster, log, lost):
    manager = cluster.managers[0]
    log.lost = lost
    assert manager.recall_kvcache(UID, 2, 1)
    cluster.settle()
    assert manager.phase(UID) is not Phase.IDLE
    log.lost = ()
    cluster.tick()
    cluster.settle()

    assert manager.phase(UID) is Phase.IDLE
    assert manager.borrowed() == {1: 2}
    assert len(cluster.moves) == 0
    assert _is_covered(cluster)
    cluster.check_agreement()

  @pytest.mark.parametrize(
    ("phase", "is_lost"),
    [
      (Phase.FETCHING, True),
      (Phase.SWITCHED, False),
      (Phase.RETURNING, False),
    ],
  )
  def test_what_is_home_survives_a_restart_of_the_creditor(
    self, cluster, phase, is_lost
  ):
    """All four rBlocks are recalled."""
    manager = cluster.managers[0]
    _recall_until(cluster, phase, num_blocks=4)
    cluster.restart(1)
    for _ in range(2):
      cluster.tick()
      cluster.settle()

    assert (UID in manager.lost()) is is_lost
    assert manager.phase(UID) is Phase.IDLE
    assert manager.borrowed() == {}
    if not is_lost:
      assert _is_covered(cluster)
    manager.close(UID)
    cluster.settle()
    cluster.check_empty()

  def test_a_fetch_of_ended_leases_sends_nothing(self, cluster):
    manager, creditor, _ = cluster.managers
    cluster.now_s += 5.5
    creditor.tick()
    cluster.now_s += 5.5
    assert not manager.recall_kvcache(UID, 2, 1)  # not trusted any more
    cluster.tick(0.0)
    cluster.settle()
    assert manager.is_readable(UID)  # the creditor had slept

    creditor._creditor.end_leases_of(0)
    assert manager.recall_kvcache(UID, 2, 1)
    cluster.settle()

    assert cluster.refused_payloads == 0
    assert UID in manager.lost()
    assert manager.counts().reserved == 0


class TestFreeze:
  def test_a_frozen_instance_gives_no_blocks(self, cluster):
    manager = cluster.managers[0]
    cluster.open(2, 9, 2 * BLOCK_SIZE)
    manager.plans.freeze(2.0)

    assert manager.is_frozen
    assert not manager.allocate(UID, 1)
    assert not manager.borrow(UID, 1)
    assert not manager.move_kvcache(UID, 1, 2)
    assert cluster.managers[2].move_kvcache(9, 1, 0)
    for _ in until(lambda: not cluster.carry()):
      pass
    assert manager.lent() == {}

  def test_a_frozen_instance_calls_its_blocks_home(self, cluster):
    manager = cluster.managers[0]
    manager.plans.freeze(2.0)
    assert manager.recall_kvcache(UID, 4, 1)
    cluster.settle()

    assert manager.borrowed() == {}

  def test_frost_ends_by_itself(self, cluster):
    manager = cluster.managers[0]
    manager.plans.freeze(2.0)
    cluster.tick(1.9)
    assert manager.is_frozen
    cluster.tick(0.1)

    assert not manager.is_frozen
    assert manager.allocate(UID, 1)

  def test_frost_can_be_ended(self, cluster):
    manager = cluster.managers[0]
    manager.plans.freeze(2.0)
    manager.plans.freeze(0.0)

    assert not manager.is_frozen

  def test_frost_lasts_no_longer_than_a_lease_whatever_is_asked(self, cluster):
    manager = cluster.managers[0]
    manager.plans.freeze(float("inf"))
    cluster.tick(10.0)

    assert not manager.is_frozen


class TestPlans:
  def _tell(self, cluster, body, seq=1):
    manager = cluster.managers[0]
    manager.on_message(
      Envelope(
        sender=GMANAGER,
        receiver=0,
        incarnation=1,
        seq=seq,
        body=body,
        leader_epoch=9,
      )
    )
    return manager

  def test_a_move_is_followed(self, cluster):
    plan = MoveKvcache(uid=UID, num_blocks=1, dst=2)
    manager = self._tell(cluster, plan)
    cluster.settle()

    assert manager.borrowed() == {1: 4, 2: 1}
    assert manager.plans.num_declined == 0
    assert _is_covered(cluster)

  def test_a_plan_that_comes_again_is_not_followed_again(self, cluster):
    for _ in range(3):
      manager = self._tell(cluster, MoveKvcache(uid=UID, num_blocks=1, dst=2))
      cluster.settle()
    assert manager.borrowed() == {1: 4, 2: 1}

    recall = RecallKvcache(uid=UID, num_blocks=2, src=1, freeze_s=2.0)
    for _ in range(2):
      self._tell(cluster, recall, seq=2)
      cluster.settle()
    assert manager.borrowed() == {1: 2, 2: 1}
    assert manager.plans.num_declined == 0

  def test_a_recall_is_followed_and_freezes_until_it_is_over(self, cluster):
    plan = RecallKvcache(uid=UID, num_blocks=3, src=1, freeze_s=2.0)
    manager = self._tell(cluster, plan)
    cluster.open(2, 9, 2 * BLOCK_SIZE)
    assert manager.is_frozen
    assert not manager.allocate(UID, 1)
    assert cluster.managers[2].move_kvcache(9, 1, 0)
    cluster.settle()

    assert manager.borrowed() == {1: 1}
    assert manager.lent() == {}
    assert not manager.is_frozen
    assert manager.allocate(UID, 1)
    assert _is_covered(cluster)

  def test_a_recall_that_takes_too_long_freezes_no_longer(self, cluster, log):
    log.lost = Fetch
    plan = RecallKvcache(uid=UID, num_blocks=3, src=1, freeze_s=2.0)
    manager = self._tell(cluster, plan)
    cluster.tick(1.9)
    assert manager.is_frozen
    cluster.tick(0.1)

    assert manager.phase(UID) is Phase.FETCHING
    assert not manager.is_frozen

  @pytest.mark.parametrize(
    "plan",
    [
      MoveKvcache(uid=99, num_blocks=1, dst=2),
      MoveKvcache(uid=UID, num_blocks=1, dst=2, with_request=True),
      RecallKvcache(uid=99, num_blocks=1, src=1, freeze_s=2.0),
      RecallKvcache(uid=UID, num_blocks=1, src=2, freeze_s=2.0),
    ],
  )
  def test_who_cannot_follow_waits_for_the_next_plan(self, cluster, plan):
    manager = self._tell(cluster, plan)

    cluster.settle()
    assert manager.plans.num_declined == 1
    assert not manager.is_frozen
    assert manager.borrowed() == {1: 4}
    assert manager.refused == {}


class TestMigration:
  _PLAN = MoveKvcache(uid=UID, num_blocks=6, dst=2, with_request=True)

  def _tell(self, manager, seq=1):
    manager.on_message(
      Envelope(
        sender=GMANAGER,
        receiver=0,
        incarnation=1,
        seq=seq,
        body=self._PLAN,
        leader_epoch=9,
      )
    )
    return manager.drain_effects()

  def _manager(self, **options):
    cluster = FakeCluster(3, 9, **({"policy": "migrate"} | options))
    cluster.introduce()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    return cluster.managers[0]

  def test_a_request_that_may_leave_is_handed_out(self):
    manager = self._manager()

    assert self._tell(manager) == [MigrateRequest(uid=UID, dst=2)]
    assert manager.plans.num_declined == 0
    # Whoever carries it out ends the request here.
    assert manager.table(UID).num_blocks == 6
    manager.close(UID)
    assert manager.counts().free == 8
    assert self._tell(manager, seq=2) == []
    assert manager.plans.num_declined == 1

  def test_other_policies_migrate_nothing(self):
    manager = self._manager(policy="borrow")

    assert self._tell(manager) == []
    assert manager.plans.num_declined == 1

  def test_what_lies_elsewhere_stays(self):
    manager = self._manager()
    assert manager.move_kvcache(UID, 1, 1)
    manager.drain_effects()

    assert self._tell(manager) == []
    assert manager.plans.num_declined == 1

  def test_a_frozen_instance_keeps_its_requests(self):
    manager = self._manager()
    manager.plans.freeze(1.0)

    assert self._tell(manager) == []
    assert manager.plans.num_declined == 1
