"""What happens when coverage fails, by what went wrong."""

import pytest

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import BlockState
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.rmanager import Reconcile, RManager
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

UID = 7


@pytest.fixture
def cluster():
  """Two instances; six rBlocks of a request, two of them lent."""
  cluster = FakeCluster(2, 9)
  cluster.heartbeat()
  cluster.open(0, UID, 6 * BLOCK_SIZE)
  assert cluster.managers[0].borrow(UID, 2)
  cluster.settle()
  return cluster


def _switch(cluster):
  """Moves two more rBlocks, up to the point where proof is awaited."""
  assert cluster.managers[0].borrow(UID, 2)
  for _ in until(lambda: cluster.managers[0].phase(UID) is Phase.SWITCHED):
    cluster.carry()
    cluster.exchange()


def _is_covered(cluster):
  return cluster.covers(0, UID, cluster.proved[UID])


def test_unproved_moves_are_undone_first(cluster):
  manager = cluster.managers[0]
  _switch(cluster)

  assert manager.reconcile(UID) is Reconcile.RETRY

  assert [n for n, _ in manager.table(UID).hosted_entries(1)] == [0, 1]
  assert manager.pool.block(3).state is BlockState.LIVE
  # The release replaces the table version that is named again.
  assert not manager.is_readable(UID)
  cluster.settle()
  assert manager.is_readable(UID)
  assert manager.spill(UID).versions == {1: 2}
  assert _is_covered(cluster)
  cluster.check_agreement()


def test_a_refuted_move_is_undone_and_can_be_tried_again(cluster):
  manager = cluster.managers[0]
  _switch(cluster)
  manager.on_verified(UID, False)
  cluster.settle()
  assert manager.borrowed() == {1: 2}
  assert manager.lost() == ()

  cluster.heartbeat()
  assert manager.borrow(UID, 2)
  cluster.settle()

  assert manager.borrowed() == {1: 4}
  assert _is_covered(cluster)


def test_a_refuted_first_move_leaves_the_request_at_home():
  cluster = FakeCluster(2, 9)
  cluster.heartbeat()
  cluster.open(0, UID, 4 * BLOCK_SIZE)
  _switch(cluster)
  manager = cluster.managers[0]

  manager.on_verified(UID, False)

  assert manager.spill(UID) is None
  assert manager.is_readable(UID)  # no creditor is read any more
  assert _is_covered(cluster)
  cluster.settle()
  assert manager.num_free_slots == 4


def test_moves_refuted_again_and_again_mean_that_the_kv_is_gone(cluster):
  manager = cluster.managers[0]
  cluster.devices[0].tag[6] = 0  # a block that does not even move
  for _ in range(2):
    assert manager.borrow(UID, 1)
    cluster.settle()
    cluster.heartbeat()

  assert manager.lost() == (UID,)
  assert not manager.borrow(UID, 1)
  assert manager.reconcile(UID) is Reconcile.RECOMPUTE


def test_a_payload_whose_source_was_overwritten_is_refuted(cluster):
  manager = cluster.managers[0]
  assert manager.borrow(UID, 1)
  for _ in until(lambda: bool(cluster.moves)):
    cluster.carry()
  tag = cluster.devices[0].tag[cluster.moves[0].src_block]
  cluster.devices[0].tag[cluster.moves[0].src_block] = 5
  cluster.exchange()
  cluster.devices[0].tag[3] = tag
  cluster.settle()

  assert manager.borrowed() == {1: 2}
  assert _is_covered(cluster)


def test_creditors_install_stale_tables_anew(cluster):
  manager, creditor = cluster.managers
  generation = creditor.hosted.generation
  manager.reconcile(UID)
  assert not manager.is_readable(UID)

  cluster.settle()

  assert creditor.hosted.generation > generation  # the devices get it again
  assert manager.is_readable(UID)
  assert manager.spill(UID).versions == {1: 1}
  assert _is_covered(cluster)


def test_a_failure_after_a_sync_means_recomputing(cluster):
  manager = cluster.managers[0]
  cluster.devices[1].tag[1] = 0  # a recycled rBlock: no table helps
  assert not _is_covered(cluster)

  assert manager.reconcile(UID) is Reconcile.RETRY
  cluster.settle()
  assert manager.reconcile(UID) is Reconcile.RECOMPUTE


def test_a_proved_step_begins_the_ladder_anew(cluster):
  manager = cluster.managers[0]
  assert manager.reconcile(UID) is Reconcile.RETRY
  cluster.settle()
  manager.confirm(UID, cluster.proved[UID])

  assert manager.reconcile(UID) is Reconcile.RETRY
  assert manager.phase(UID) is Phase.SYNCING


def test_a_request_all_at_home_has_nothing_to_sync():
  cluster = FakeCluster(2, 9)
  cluster.open(0, UID, 2 * BLOCK_SIZE)

  assert cluster.managers[0].reconcile(UID) is Reconcile.RECOMPUTE


def test_a_row_of_a_step_launched_before_the_sync_changes_nothing(cluster):
  manager = cluster.managers[0]
  assert manager.reconcile(UID) is Reconcile.RETRY
  assert manager.reconcile(UID) is Reconcile.RETRY
  cluster.settle()
  assert manager.reconcile(UID) is Reconcile.RECOMPUTE


def test_a_sync_waits_for_what_is_under_way(cluster):
  manager = cluster.managers[0]
  assert manager.borrow(UID, 1)
  for _ in until(lambda: manager.phase(UID) is Phase.MOVING):
    cluster.carry()

  assert manager.reconcile(UID) is Reconcile.RETRY
  assert manager.phase(UID) is Phase.MOVING
  assert not manager.is_readable(UID)
  cluster.settle()

  assert manager.phase(UID) is Phase.IDLE
  assert manager.borrowed() == {1: 3}
  assert manager.is_readable(UID)
  assert _is_covered(cluster)


def test_a_sync_does_not_wait_for_creditors_not_yet_asked(cluster):
  manager = cluster.managers[0]
  assert manager.borrow(UID, 1)

  assert manager.reconcile(UID) is Reconcile.RETRY
  cluster.settle()

  assert manager.borrowed() == {1: 2}
  assert manager.spill(UID).versions == {1: 1}
  assert manager.borrow(UID, 1)


def test_a_creditor_that_forgot_everything_makes_the_request_recompute(cluster):
  manager = cluster.managers[0]
  cluster.managers[1] = RManager(
    1,
    2,
    BlockPool(1, cluster.num_blocks),
    BLOCK_SIZE,
    cluster.lending,
    lambda: cluster.now_s,
    incarnation=2,
  )
  cluster.transport.register(1, cluster.managers[1].on_message)
  assert not _is_covered(cluster)

  assert manager.reconcile(UID) is Reconcile.RETRY
  cluster.settle()

  assert manager.lost() == (UID,)
  assert manager.reconcile(UID) is Reconcile.RECOMPUTE
  manager.close(UID)
  cluster.settle()
  cluster.check_agreement()
  assert manager.num_free_slots == 4
