import pytest

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.content_tag import content_tag
from infinite_llm.cache.rblock import BlockState
from infinite_llm.config import LendingConfig
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.account import Phase, Reconcile
from infinite_llm.scheduler.effects import Swap, SwapBlocks
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.swapping import HostTier, Stage
from infinite_llm.types import PoolCounts, Tier
from tests.scheduler.fake_cluster import BLOCK_SIZE, SWAP_COSTS, FakeCluster

UID = 7


def _cluster(num_instances=1, *, policy="swap", host_blocks=6):
  """8 rBlocks in HBM and 5 in HOST per instance.

  UID has 3 full rBlocks, in HBM 1 to 3 under epochs 1 to 3, and half of one.
  """
  cluster = FakeCluster(
    num_instances, 9, policy=policy, host_blocks=host_blocks
  )
  cluster.introduce()
  cluster.heartbeat()
  cluster.open(0, UID, 3 * BLOCK_SIZE + 4)
  return cluster


def _counts(total, **counts):
  zeros = {"used": 0, "free": 0, "hosted": 0, "reserved": 0}
  return PoolCounts(**zeros | counts, total=total)


def _both(manager):
  return manager.counts(), manager.counts(Tier.HOST)


def _tag(logical_id, epoch):
  return content_tag(
    uid=UID, logical_id=logical_id, epoch=epoch, filled=BLOCK_SIZE
  )


def _swaps(places):
  """One for each `(src_block, src_epoch, dst_block, dst_epoch)`."""
  return tuple(
    Swap(
      uid=UID,
      logical_id=logical_id,
      src_block=src_block,
      src_tag=_tag(logical_id, src_epoch),
      dst_block=dst_block,
      dst_tag=_tag(logical_id, dst_epoch),
    )
    for logical_id, (src_block, src_epoch, dst_block, dst_epoch) in enumerate(
      places
    )
  )


def _bring_to(cluster, stage):
  """Has UID go on until it is at a stage."""
  manager = cluster.managers[0]
  assert manager.swapping.swap_out(UID)
  cluster.carry()
  if stage is not Stage.LEAVING:
    cluster.swap()
  if stage not in (Stage.LEAVING, Stage.WAITING):
    assert manager.swapping.swap_in(UID) == 3 * BLOCK_SIZE
    cluster.proved[UID] = 3 * BLOCK_SIZE
    cluster.carry()
  if stage is Stage.UNPROVED:
    cluster.swap()
  if stage is Stage.RETREATING:
    assert manager.swapping.swap_out(UID)
  assert manager.swapping.stage(UID) is stage
  return manager


class TestOut:
  def test_full_blocks_are_copied_and_the_last_one_is_free_at_once(self):
    cluster = _cluster()
    manager = cluster.managers[0]

    assert manager.swapping.swap_out(UID)

    assert manager.drain_effects() == [
      SwapBlocks(
        to_tier=Tier.HOST,
        swaps=_swaps([(1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)]),
      )
    ]
    assert _both(manager) == (
      _counts(8, used=3, free=5),
      _counts(5, reserved=3, free=2),
    )
    assert manager.pool.block(1).state is BlockState.MOVING
    assert manager.swapping.stage(UID) is Stage.LEAVING
    assert manager.swapping.is_making_room

  def test_the_acknowledgement_frees_hbm(self):
    cluster = _cluster()

    manager = _bring_to(cluster, Stage.WAITING)

    assert _both(manager) == (
      _counts(8, free=8),
      _counts(5, used=3, free=2),
    )
    assert not manager.swapping.is_making_room
    assert cluster.devices[0].host_tag == [
      0,
      *(_tag(logical_id, logical_id + 1) for logical_id in range(3)),
      0,
      0,
    ]

  def test_a_request_without_a_full_block_is_refused(self):
    cluster = _cluster()
    cluster.open(0, 8, BLOCK_SIZE - 1)
    manager = cluster.managers[0]
    before = _both(manager)

    assert not manager.swapping.swap_out(8)

    assert _both(manager) == before
    assert manager.table(8).num_blocks == 1

  def test_a_request_that_host_has_no_room_for_is_refused(self):
    cluster = _cluster(host_blocks=3)
    manager = cluster.managers[0]
    before = _both(manager)

    assert not manager.swapping.swap_out(UID)

    assert _both(manager) == before
    assert manager.drain_effects() == []

  def test_without_host_nothing_is_swapped(self):
    cluster = _cluster(host_blocks=0)
    manager = cluster.managers[0]

    assert not manager.swapping.is_preferred(UID)
    assert not manager.swapping.swap_out(UID)
    assert manager.counts(Tier.HOST) == _counts(0)

  def test_a_busy_request_and_one_with_blocks_elsewhere_are_refused(self):
    cluster = _cluster(2, policy="borrow")
    manager = cluster.managers[0]
    assert manager.move_kvcache(UID, 1, 1)
    assert manager.phase(UID) is Phase.RESERVING
    assert not manager.swapping.swap_out(UID)
    cluster.settle()
    assert manager.phase(UID) is Phase.IDLE
    assert manager.table(UID).creditors() == (1,)
    assert not manager.swapping.swap_out(UID)
    assert manager.recall_kvcache(UID, 1, 1)
    cluster.settle()

    assert manager.swapping.swap_out(UID)

    cluster.settle()
    assert manager.num_free_slots == cluster.lending.spill_slots
    manager.swapping.drop(UID)
    cluster.check_empty()


class TestIn:
  def test_blocks_are_copied_back_before_they_are_read(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.WAITING)
    cluster.open(0, 8, BLOCK_SIZE)  # It takes HBM 1 under epoch 5.

    assert manager.swapping.swap_in(UID) == 24

    assert manager.drain_effects() == [
      SwapBlocks(
        to_tier=Tier.HBM,
        swaps=_swaps([(1, 1, 2, 6), (2, 2, 3, 7), (3, 3, 4, 8)]),
      )
    ]
    assert manager.table(UID).local_entries().block_ids.tolist() == [2, 3, 4]
    assert _both(manager) == (
      _counts(8, used=1, reserved=3, free=4),
      _counts(5, used=3, free=2),
    )
    assert manager.phase(UID) is Phase.SWAPPING_IN
    assert not manager.is_readable(UID)
    assert not manager.swapping.is_making_room

  def test_a_proved_step_frees_host(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.UNPROVED)
    assert manager.is_readable(UID)
    assert manager.phase(UID) is Phase.SWAPPED_IN
    assert manager.movable_blocks(UID) == 0

    cluster.compute(0, UID, 4)

    assert manager.phase(UID) is Phase.IDLE
    assert manager.swapping.stage(UID) is None
    assert _both(manager) == (
      _counts(8, used=4, free=4),
      _counts(5, free=5),
    )

  @pytest.mark.parametrize("to_tier", list(Tier))
  def test_lost_copies_are_computed_again(self, to_tier):
    cluster = _cluster()
    manager = cluster.managers[0]
    assert manager.swapping.swap_out(UID)
    cluster.carry()
    cluster.swap(spoils=to_tier is Tier.HOST)
    manager.swapping.swap_in(UID)
    cluster.carry()
    cluster.swap(spoils=to_tier is Tier.HBM)

    assert not cluster.covers(0, UID, 3 * BLOCK_SIZE)
    assert manager.reconcile(UID) is Reconcile.RECOMPUTE

    manager.close(UID)
    cluster.check_empty()

  def test_what_is_being_copied_or_lacks_room_waits(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.LEAVING)
    assert manager.swapping.swap_in(UID) is None
    cluster.swap()
    cluster.open(0, 8, 6 * BLOCK_SIZE)

    assert manager.swapping.swap_in(UID) is None

    assert _both(manager) == (
      _counts(8, used=6, free=2),
      _counts(5, used=3, free=2),
    )
    manager.close(8)
    assert manager.swapping.swap_in(UID, spare=6) is None
    assert manager.swapping.swap_in(UID, spare=5) == 24

  def test_preempted_before_the_proof_it_keeps_its_host_blocks(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.UNPROVED)
    assert manager.swapping.is_preferred(UID)

    assert manager.swapping.swap_out(UID)

    assert manager.drain_effects() == []
    assert manager.swapping.stage(UID) is Stage.WAITING
    assert _both(manager) == (
      _counts(8, free=8),
      _counts(5, used=3, free=2),
    )

  def test_preempted_on_the_way_in_it_keeps_hbm_until_that_is_over(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.RETREATING)
    assert manager.counts() == _counts(8, reserved=3, free=5)
    assert manager.swapping.is_making_room
    assert manager.swapping.swap_in(UID) is None

    cluster.swap()

    assert manager.swapping.stage(UID) is Stage.WAITING
    assert _both(manager) == (
      _counts(8, free=8),
      _counts(5, used=3, free=2),
    )
    assert manager.swapping.swap_in(UID) == 24
    cluster.settle()
    assert cluster.covers(0, UID, 24)


class TestEnd:
  @pytest.mark.parametrize(
    ("stage", "hbm", "host"),
    [
      # Both ends of a copy under way are kept: HBM 3, HOST 3.
      (Stage.LEAVING, {"used": 3, "free": 5}, {"reserved": 3, "free": 2}),
      (Stage.WAITING, {"free": 8}, {"free": 5}),
      (Stage.ENTERING, {"reserved": 3, "free": 5}, {"used": 3, "free": 2}),
      (Stage.RETREATING, {"reserved": 3, "free": 5}, {"used": 3, "free": 2}),
      (Stage.UNPROVED, {"free": 8}, {"free": 5}),
    ],
  )
  def test_nothing_leaks_whatever_is_under_way(self, stage, hbm, host):
    cluster = _cluster()
    manager = _bring_to(cluster, stage)

    if stage in (Stage.ENTERING, Stage.UNPROVED):
      manager.close(UID)
    else:
      assert not manager.swapping.drop(UID)

    assert _both(manager) == (_counts(8, **hbm), _counts(5, **host))
    assert manager.swapping.stage(UID) is None
    cluster.settle()
    cluster.check_empty()

  def test_a_late_copy_hits_nobody_else(self):
    cluster = _cluster()
    manager = _bring_to(cluster, Stage.ENTERING)  # To HBM 1, 2, 3.
    manager.close(UID)

    cluster.open(0, UID, 2 * BLOCK_SIZE)  # The same uid begins anew.

    table = manager.table(UID)
    assert table.local_entries().block_ids.tolist() == [4, 5]
    cluster.swap()
    assert cluster.covers(0, UID, 2 * BLOCK_SIZE)
    assert manager.counts() == _counts(8, used=2, free=6)


class TestMisuse:
  def test_copies_are_acknowledged_once(self):
    cluster = _cluster()
    manager = cluster.managers[0]
    manager.swapping.swap_out(UID)
    (effect,) = manager.drain_effects()
    manager.swapping.on_swapped(effect)

    with pytest.raises(InvariantError, match="No copies to HOST like these"):
      manager.swapping.on_swapped(effect)

  def test_a_request_that_waits_in_host_is_not_opened(self):
    manager = _bring_to(_cluster(), Stage.WAITING)

    with pytest.raises(InvariantError, match="Request 7 has rBlocks in HOST"):
      manager.open(UID)

  def test_a_request_that_is_not_in_host_cannot_come_from_there(self):
    manager = _cluster().managers[0]

    with pytest.raises(InvariantError, match="Request 7 has nothing in HOST"):
      manager.swapping.swap_in(UID)

  def test_a_request_that_is_out_does_not_leave(self):
    manager = _bring_to(_cluster(), Stage.WAITING)

    with pytest.raises(InvariantError, match="is awaiting room in HBM already"):
      manager.swapping.swap_out(UID)

  @pytest.mark.parametrize(
    ("pool", "named"),
    [
      (BlockPool(0, 4), "HBM pool of instance 0"),
      (BlockPool(1, 4, tier=Tier.HOST), "HOST pool of instance 1"),
    ],
  )
  def test_host_must_be_the_host_tier_of_the_instance(self, pool, named):
    host = HostTier(pool=pool, costs=SWAP_COSTS)

    with pytest.raises(ConfigError) as raised:
      RManager(
        0, 1, BlockPool(0, 4), 8, LendingConfig(), lambda: 0.0, host=host
      )

    assert str(raised.value) == (
      f"host must be the HOST pool of instance 0; got the {named}."
    )


@pytest.mark.parametrize("policy", ["borrow", "migrate", "static"])
def test_host_memory_is_used_whatever_the_policy(policy):
  assert _cluster(policy=policy).managers[0].swapping.is_preferred(UID)


def test_it_is_used_where_copies_are_faster():
  cluster = _cluster()
  cluster.open(0, 8, BLOCK_SIZE - 1)
  swapping = cluster.managers[0].swapping

  assert swapping.is_preferred(UID)
  assert not swapping.is_preferred(8)
