import dataclasses

import pytest

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import BlockState, Location
from infinite_llm.config import LendingConfig
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.effects import GrantEpochs, Move, MoveBlocks
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Grant,
  HostedEntry,
  Release,
  ReleaseReply,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  CandidatesRequest,
  RequestBlocks,
)
from infinite_llm.scheduler.rmanager import RManager, SpillInfo
from infinite_llm.types import PoolCounts
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

UID = 7


def _cluster(num_instances=2, num_blocks=9, **kwargs):
  """A cluster that knows itself; 8 rBlocks of 8 tokens per instance."""
  cluster = FakeCluster(num_instances, num_blocks, **kwargs)
  cluster.introduce()
  cluster.heartbeat()
  return cluster


def _borrow(cluster, num_blocks, *, phase=None, uid=UID):
  """Borrows for a request of instance 0, to the end or up to a phase."""
  manager = cluster.managers[0]
  assert manager.borrow(uid, num_blocks)
  if phase is None:
    cluster.settle()
    return
  for _ in until(lambda: manager.phase(uid) is phase):
    cluster.carry()
    if manager.phase(uid) is Phase.MOVING and phase is not Phase.MOVING:
      cluster.exchange()


class Spy:
  """Notes bodies on their way, and may lose or repeat them."""

  def __init__(self):
    self.seen = []
    self.copies = {}

  def __call__(self, envelope):
    self.seen.append(envelope)
    return [envelope] * self.copies.get(type(envelope.body), 1)

  def bodies(self, *types):
    return [m.body for m in self.seen if isinstance(m.body, types)]


_LENDING = (
  CandidatesRequest,
  Reserve,
  ReserveReply,
  Commit,
  CommitReply,
  Release,
  ReleaseReply,
  Sync,
  SyncReply,
)


class TestBorrowing:
  def test_the_oldest_full_blocks_move_to_the_creditor(self):
    cluster = _cluster()
    table = cluster.open(0, UID, 8 * BLOCK_SIZE - 1)  # the last is not full
    _borrow(cluster, 3)

    # Instance 0: logical 0, 1, 2 went from its blocks 1, 2, 3.
    assert table.local_entries().block_ids.tolist() == [4, 5, 6, 7, 8]
    assert table.hosted_entries(1) == tuple(
      (n, Location(instance=1, block_id=n + 1, epoch=n + 1)) for n in range(3)
    )
    assert cluster.managers[0].spill(UID) == SpillInfo(
      slot=0, slot_epoch=1, versions={1: 0}
    )
    assert cluster.managers[0].counts() == PoolCounts(
      used=5, free=3, hosted=0, reserved=0, total=8
    )
    assert cluster.managers[1].counts() == PoolCounts(
      used=0, free=5, hosted=3, reserved=0, total=8
    )
    assert cluster.covers(0, UID, 8 * BLOCK_SIZE - 1)

  def test_the_messages_of_a_borrow_are_these(self):
    spy = Spy()
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 2 * BLOCK_SIZE)
    _borrow(cluster, 1)

    slot = SlotName(slot=0, epoch=1)
    grant = Grant(block_id=1, epoch=1)
    entry = HostedEntry(logical_id=0, grant=grant)
    assert spy.bodies(*_LENDING) == [
      CandidatesRequest(num_blocks=1),
      Reserve(uid=UID, slot=slot, num_blocks=1),
      ReserveReply(grants=(grant,)),
      Commit(uid=UID, slot=slot, entries=(entry,)),
      CommitReply(table_version=0),
    ]

  def test_effects_name_blocks_epochs_and_tags(self):
    cluster = _cluster()
    table = cluster.open(0, UID, 2 * BLOCK_SIZE)
    src_tag = table.tag(0, BLOCK_SIZE)
    debtor, creditor = cluster.managers
    debtor.borrow(UID, 1)
    effects = []
    for _ in range(4):
      for sender in (debtor, creditor, cluster.gmanager):
        for envelope in sender.drain_messages():
          cluster.transport.send(envelope)
      cluster.transport.deliver()
      effects += creditor.drain_effects() + debtor.drain_effects()

    granted, moved = effects
    assert granted == GrantEpochs(block_ids=(1,), epochs=(1,))
    (move,) = moved.moves
    assert isinstance(moved, MoveBlocks)
    assert move == Move(
      uid=UID,
      logical_id=0,
      src_instance=0,
      src_block=1,
      src_tag=src_tag,
      dst_instance=1,
      dst_block=1,
      dst_epoch=1,
      dst_tag=move.dst_tag,
    )
    assert table.location(0).instance == 0
    debtor.on_exchanged([move])
    cluster.settle()
    assert table.tag(0, BLOCK_SIZE) == move.dst_tag

  def test_old_copies_stay_until_the_new_ones_are_proved(self):
    cluster = _cluster()
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.SWITCHED)
    pool = cluster.managers[0].pool

    assert cluster.managers[0].unverified() == (UID,)
    assert pool.block(1).state is pool.block(2).state is BlockState.MOVING
    assert pool.counts().used == 4

    cluster.verify()

    assert cluster.managers[0].unverified() == ()
    assert pool.block(1).state is pool.block(2).state is BlockState.FREE

  def test_a_step_can_be_proved_in_every_phase(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 4 * BLOCK_SIZE + 3)
    manager.borrow(UID, 2)
    phases = set()
    for _ in until(lambda: manager.phase(UID) is Phase.IDLE):
      phases.add(manager.phase(UID))
      assert manager.is_readable(UID)
      assert cluster.covers(0, UID, cluster.proved[UID])
      cluster.compute(0, UID, 1)  # goes on meanwhile
      if not cluster.carry() and not cluster.exchange():
        cluster.verify()

    assert phases == {
      Phase.ASKING,
      Phase.RESERVING,
      Phase.MOVING,
      Phase.COMMITTING,
      Phase.SWITCHED,
    }

  def test_a_partial_grant_is_used_and_the_rest_asked_of_the_next(self):
    spy = Spy()
    cluster = _cluster(3, interceptor=spy)
    table = cluster.open(0, UID, 6 * BLOCK_SIZE)
    cluster.open(1, UID + 1, 6 * BLOCK_SIZE)  # Not heard of, as it asks.
    _borrow(cluster, 3)

    assert cluster.managers[0].borrowed() == {1: 2, 2: 1}
    assert [n for n, _ in table.hosted_entries(1)] == [0, 1]
    assert [n for n, _ in table.hosted_entries(2)] == [2]
    assert [m.num_blocks for m in spy.bodies(Reserve)] == [3, 1]
    assert cluster.covers(0, UID, 6 * BLOCK_SIZE)

  def test_nobody_is_asked_for_more_than_its_share(self):
    spy = Spy()
    cluster = _cluster(3, interceptor=spy, bound_remote_share=True)
    cluster.open(0, UID, 7 * BLOCK_SIZE)
    for instance in (1, 2):  # Where 4 rBlocks are in use, 3 more are hidden.
      cluster.open(instance, UID + instance, 4 * BLOCK_SIZE)
    cluster.heartbeat()
    _borrow(cluster, 5)

    assert cluster.managers[0].borrowed() == {1: 3, 2: 2}
    assert [m.num_blocks for m in spy.bodies(Reserve)] == [3, 2]

  def test_a_second_borrow_is_a_new_version(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2)
    _borrow(cluster, 1)

    assert cluster.managers[0].spill(UID).versions == {1: 1}
    assert cluster.covers(0, UID, 6 * BLOCK_SIZE)

  def test_payloads_may_take_several_exchanges(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 5, phase=Phase.MOVING)
    manager = cluster.managers[0]

    for _ in range(2):
      cluster.exchange(quota=2)
      assert manager.phase(UID) is Phase.MOVING
    cluster.exchange(quota=2)

    assert manager.phase(UID) is Phase.COMMITTING

  def test_only_proved_full_blocks_can_move(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 2 * BLOCK_SIZE + 1)
    manager.allocate(UID, 2)

    assert manager.movable_blocks(UID) == 2
    cluster.write(0, UID, 2 * BLOCK_SIZE, 5 * BLOCK_SIZE)  # not proved
    assert manager.movable_blocks(UID) == 2

  def test_one_borrow_of_a_request_at_a_time(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 6 * BLOCK_SIZE)

    assert not manager.is_borrowing()
    assert manager.borrow(UID, 1)
    assert manager.is_borrowing()
    assert not manager.borrow(UID, 1)
    assert manager.movable_blocks(UID) == 0

  def test_requests_beyond_the_spill_slots_cannot_borrow(self):
    cluster = _cluster(spill_slots=1)
    manager = cluster.managers[0]
    cluster.open(0, UID, 2 * BLOCK_SIZE)
    cluster.open(0, 8, 2 * BLOCK_SIZE)
    _borrow(cluster, 1)

    assert manager.num_free_slots == 0
    assert not manager.borrow(8, 1)

    manager.close(UID)
    cluster.settle()

    assert manager.borrow(8, 1)
    cluster.settle()
    assert manager.spill(8).slot_epoch == 2
    assert cluster.covers(0, 8, 2 * BLOCK_SIZE)

  def test_nothing_movable_is_no_borrow(self):
    cluster = _cluster()
    cluster.open(0, UID, BLOCK_SIZE - 1)

    assert not cluster.managers[0].borrow(UID, 1)
    assert cluster.managers[0].num_free_slots == 4


class TestRefusal:
  def test_a_full_creditor_refuses_and_never_borrows_itself(self):
    spy = Spy()
    cluster = _cluster(3, interceptor=spy)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    cluster.open(1, 8, 8 * BLOCK_SIZE)  # full; instance 2 has room
    # Instance 1 looks roomy still: the ledger is stale.
    assert cluster.gmanager.view().lines[1].lendable == 8
    _borrow(cluster, 2)

    assert cluster.managers[0].borrowed() == {2: 2}
    assert [m.receiver for m in spy.seen if isinstance(m.body, Reserve)] == [
      1,
      2,
    ]
    assert cluster.managers[1].borrowed() == {}

  def test_after_a_round_of_refusals_room_must_be_heard_of_first(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    cluster.open(1, 8, 8 * BLOCK_SIZE)
    _borrow(cluster, 2)  # The stale ledger made it try.

    assert manager.spill(UID) is None
    assert manager.num_free_slots == 4
    assert not manager.borrow(UID, 2)

    cluster.heartbeat()
    assert not manager.borrow(UID, 2)

    cluster.managers[1].close(8)
    cluster.heartbeat()
    assert manager.lendable_elsewhere() == 8
    _borrow(cluster, 2)
    assert manager.borrowed() == {1: 2}

  def test_the_cap_and_the_headroom_hold(self):
    cluster = _cluster(3, headroom_blocks=2, max_lent_blocks=5)
    cluster.open(1, 8, 2 * BLOCK_SIZE)  # leaves 6, of which 4 may go
    cluster.heartbeat()
    assert cluster.managers[0].lendable_elsewhere() == 4 + 5

    cluster.open(0, UID, 8 * BLOCK_SIZE)
    _borrow(cluster, 8)

    assert cluster.managers[1].lent() == {0: 3}
    assert cluster.managers[2].lent() == {0: 5}

  def test_the_static_policy_lends_nothing(self):
    cluster = _cluster(policy="static")
    manager = cluster.managers[0]
    cluster.open(0, UID, 4 * BLOCK_SIZE)

    assert manager.lendable_elsewhere() == 0
    assert manager.choose_victim([UID]) is None
    assert not manager.borrow(UID, 2)


class TestClosing:
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
  def test_a_request_may_end_in_any_phase_of_a_borrow(self, phase):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 1)
    _borrow(cluster, 2, phase=phase)
    assert cluster.managers[0].phase(UID) is phase

    cluster.managers[0].close(UID)

    assert cluster.managers[0].counts().free == 8
    cluster.settle()
    cluster.check_agreement()
    cluster.check_empty()

  def test_a_request_may_end_between_borrows(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2)
    cluster.managers[0].close(UID)
    assert cluster.managers[0].borrowed() == {1: 2}

    cluster.settle()

    cluster.check_empty()

  def test_a_request_may_end_while_copies_are_given_back(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.SWITCHED)
    cluster.managers[0].on_verified(UID, False)
    assert cluster.managers[0].phase(UID) is Phase.RETURNING

    cluster.managers[0].close(UID)

    cluster.settle()
    cluster.check_empty()

  def test_a_request_may_end_during_a_sync(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2)
    cluster.managers[0].reconcile(UID)
    assert cluster.managers[0].phase(UID) is Phase.SYNCING

    cluster.managers[0].close(UID)

    cluster.settle()
    cluster.check_empty()

  def test_grants_that_arrive_late_are_given_back(self):
    spy = Spy()
    spy.copies[ReserveReply] = 0
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    manager = cluster.managers[0]
    manager.borrow(UID, 2)
    cluster.settle()
    manager.close(UID)
    cluster.settle()
    assert cluster.managers[1].lent() == {0: 2}
    assert manager.num_free_slots == 3

    spy.copies.clear()
    cluster.heartbeat()  # The reservation is asked for again.

    cluster.check_empty()

  def test_a_uid_may_begin_anew_while_its_leases_end(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.MOVING)
    manager.close(UID)
    cluster.open(0, UID, 6 * BLOCK_SIZE)

    cluster.settle()

    assert cluster.refused_payloads + cluster.devices[1].tag.count(0) > 0
    assert manager.phase(UID) is Phase.IDLE
    assert manager.spill(UID) is None
    assert cluster.covers(0, UID, 6 * BLOCK_SIZE)
    cluster.check_agreement()
    manager.close(UID)
    cluster.check_empty()

  def test_moves_of_an_earlier_life_do_not_count_for_the_present_one(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.MOVING)
    manager.close(UID)
    late = list(cluster.moves)
    cluster.moves.clear()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.MOVING)

    manager.on_exchanged(late)

    assert manager.phase(UID) is Phase.MOVING
    cluster.settle()
    assert manager.borrowed() == {1: 2}
    assert cluster.covers(0, UID, 6 * BLOCK_SIZE)

  def test_a_late_payload_does_not_hit_a_recycled_block(self):
    cluster = _cluster()
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2, phase=Phase.MOVING)
    cluster.managers[0].close(UID)
    for _ in until(lambda: not cluster.carry()):
      pass
    late = list(cluster.moves)
    cluster.moves.clear()
    cluster.open(1, 8, 2 * BLOCK_SIZE)  # takes the same rBlocks 1 and 2

    for move in late:
      cluster.receive(move)

    assert [move.dst_block for move in late] == [1, 2]
    assert cluster.refused_payloads == 2
    assert cluster.covers(1, 8, 2 * BLOCK_SIZE)

  def test_opening_twice_and_closing_twice_are_bugs(self):
    manager = _cluster().managers[0]
    manager.open(UID)
    with pytest.raises(InvariantError, match=r"Request 7 is already open"):
      manager.open(UID)
    manager.close(UID)
    with pytest.raises(InvariantError, match=r"Request 7 is not open on"):
      manager.close(UID)


class TestMessages:
  @pytest.mark.parametrize("lost", _LENDING[:5])
  def test_a_lost_message_of_a_borrow_is_made_up_for(self, lost):
    spy = Spy()
    spy.copies[lost] = 0
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2)
    assert cluster.managers[0].phase(UID) is not Phase.IDLE

    spy.copies.clear()
    cluster.tick()
    cluster.settle()

    assert cluster.managers[0].phase(UID) is Phase.IDLE
    assert cluster.managers[0].borrowed() == {1: 2}
    cluster.check_agreement()
    assert cluster.covers(0, UID, 4 * BLOCK_SIZE)

  @pytest.mark.parametrize("lost", [Release, ReleaseReply])
  def test_a_lost_release_is_made_up_for(self, lost):
    spy = Spy()
    cluster = _cluster(interceptor=spy, spill_slots=1)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2)
    spy.copies[lost] = 0
    cluster.managers[0].close(UID)
    cluster.settle()
    assert cluster.managers[0].num_free_slots == 0

    spy.copies.clear()
    cluster.tick()
    cluster.settle()

    cluster.check_empty()

  def test_repeated_messages_change_nothing(self):
    spy = Spy()
    spy.copies = dict.fromkeys(_LENDING, 3)
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 6 * BLOCK_SIZE)
    _borrow(cluster, 2)
    _borrow(cluster, 1)

    assert cluster.managers[0].spill(UID).versions == {1: 1}
    assert cluster.managers[1].lent() == {0: 3}
    cluster.check_agreement()
    cluster.managers[0].close(UID)
    cluster.settle()
    cluster.check_empty()

  def test_a_late_repetition_of_everything_changes_nothing(self):
    spy = Spy()
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2)
    cluster.managers[0].close(UID)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 1)
    table = cluster.managers[0].table(UID)
    before = table.hosted_entries(1)

    for envelope in tuple(spy.seen):
      if envelope.receiver == 1 and isinstance(envelope.body, _LENDING):
        cluster.managers[1].on_message(envelope)
    cluster.settle()

    assert table.hosted_entries(1) == before
    assert cluster.managers[1].lent() == {0: 1}
    assert cluster.covers(0, UID, 4 * BLOCK_SIZE)

  @pytest.mark.parametrize(
    "body",
    [
      Commit(
        uid=UID,
        slot=SlotName(slot=0, epoch=1),
        entries=(
          HostedEntry(logical_id=0, grant=Grant(block_id=1, epoch=1)),
          HostedEntry(logical_id=1, grant=Grant(block_id=2, epoch=1)),
        ),
      ),
      Release(
        slot=SlotName(slot=0, epoch=1), grants=(Grant(block_id=1, epoch=2),)
      ),
      Sync(
        uid=UID,
        slot=SlotName(slot=0, epoch=1),
        entries=(HostedEntry(logical_id=3, grant=Grant(block_id=8, epoch=1)),),
      ),
    ],
  )
  def test_a_message_about_another_lease_changes_nothing(self, body):
    spy = Spy()
    cluster = _cluster(interceptor=spy)
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2)
    creditor = cluster.managers[1]
    before = (creditor.counts(), creditor.lent(), creditor.hosted.generation)
    reserve = next(m for m in spy.seen if isinstance(m.body, Reserve))

    creditor.on_message(dataclasses.replace(reserve, seq=99, body=body))

    assert before == (
      creditor.counts(),
      creditor.lent(),
      creditor.hosted.generation,
    )
    (answer,) = (m.body for m in creditor.drain_messages())
    assert answer in (
      CommitReply(table_version=None),
      ReleaseReply(table_version=0),
      SyncReply(table_version=None, missing=(3,)),
    )

  def test_heartbeats_are_periodic_and_say_who_owes_whom(self):
    spy = Spy()
    cluster = _cluster(
      interceptor=spy,
      heartbeat_every_s=10.0,
      lease_s=30.0,
      expire_after_s=30.0,
    )
    cluster.open(0, UID, 4 * BLOCK_SIZE)
    _borrow(cluster, 2)
    spy.seen.clear()
    cluster.tick(5.0)
    cluster.settle()
    assert not spy.seen

    cluster.tick(5.0)
    cluster.settle()

    debtor, creditor = (m.body for m in spy.seen if m.receiver == GMANAGER)
    assert debtor.lent == creditor.requests == ()
    assert debtor.requests == (
      RequestBlocks(uid=UID, holders=((0, 2), (1, 2)), movable=2),
    )
    assert creditor.lent == ((0, 2),)
    assert creditor.counts.hosted == 2
    assert creditor.lendable == 6
    assert cluster.gmanager.view().lines[1].debts == ((0, 2),)

  @pytest.mark.parametrize(
    ("change", "text"),
    [
      ({"block_size": 0}, "block_size must be at least 1; got 0"),
      ({"block_size": -8}, "block_size must be at least 1; got -8"),
      ({"incarnation": 0}, "incarnation must be at least 1; got 0"),
      ({"pool": BlockPool(1, 10)}, "pool must be of 0; got 1"),
      (
        {"gmanagers": ()},
        r"gmanagers must be some of gmanager, standby; got \(",
      ),
      ({"gmanagers": ("x",)}, r"gmanagers must be .*; got \('x',\)"),
      ({"max_lent_blocks": 10}, "max_lent_blocks must be at most the pool's 9"),
      (
        {"headroom_blocks": 9},
        "headroom_blocks must be less than the pool's 9",
      ),
    ],
  )
  def test_what_cannot_work_is_refused(self, change, text):
    lending = {k: v for k, v in change.items() if k.endswith("_blocks")}
    options = {"pool": BlockPool(0, 10), "block_size": 8}
    options |= {k: v for k, v in change.items() if k not in lending}
    with pytest.raises(ConfigError, match=text):
      RManager(
        0, 2, lending=LendingConfig(**lending), clock=lambda: 0.0, **options
      )

  def test_who_never_lends_may_keep_all(self):
    lending = LendingConfig(policy="static", headroom_blocks=9)
    RManager(0, 2, BlockPool(0, 10), 8, lending, lambda: 0.0)
    lending = LendingConfig(headroom_blocks=9)
    RManager(0, 1, BlockPool(0, 10), 8, lending, lambda: 0.0)

  def test_an_instance_outside_its_group_is_refused(self):
    with pytest.raises(
      ConfigError, match=r"instance must be in \[0, 2\); got 2"
    ):
      RManager(2, 2, BlockPool(2, 4), 8, LendingConfig(), lambda: 0.0)
