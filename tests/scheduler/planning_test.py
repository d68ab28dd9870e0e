"""Plans from heartbeats to moved rBlocks: gManager, rManagers and devices."""

from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.condition import Demand
from infinite_llm.scheduler.planning import PlanningConfig
from tests.scheduler.cluster_views import MODEL
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

UID = 7
_STEP_S = 0.25


def _cluster(num_instances, **options):
  cluster = FakeCluster(num_instances, 9, heartbeat_every_s=_STEP_S, **options)
  _wait(cluster)
  return cluster


def _wait(cluster, steps=1):
  for _ in range(steps):
    cluster.tick(_STEP_S)
    cluster.settle()
    cluster.check()


def test_the_greedy_planner_moves_blocks_before_anybody_asks():
  planning = PlanningConfig(
    block_size=BLOCK_SIZE, performance=MODEL, debtor_batch=4
  )
  cluster = _cluster(3, policy="greedy", planning=planning)
  cluster.open(0, UID, 8 * BLOCK_SIZE)  # All that instance 0 has.
  manager = cluster.managers[0]
  manager.condition.note_demand(
    Demand(num_waiting=3, next_blocks=2, next_arrival=9)
  )

  for _ in until(lambda: manager.counts().free > 0, 40):
    assert manager.phase(UID) is Phase.IDLE
    _wait(cluster)

  # Six make room for all that wait, and fill instance 1 as far as it may be:
  # 0.8 of its 8 rBlocks.
  assert manager.borrowed() == {1: 6}
  assert manager.counts().free == 6
  assert cluster.covers(0, UID, 8 * BLOCK_SIZE)


def test_circular_debts_come_home_by_themselves():
  cluster = _cluster(2, plan_every_s=10.0)
  #  0 and 1 hold three rBlocks of each other's request.
  for owner, uid in ((0, UID), (1, UID + 1)):
    cluster.open(owner, uid, 4 * BLOCK_SIZE)
    assert cluster.managers[owner].borrow(uid, 3)
    cluster.settle()
  assert cluster.managers[0].borrowed() == {1: 3}
  assert cluster.managers[1].borrowed() == {0: 3}

  for _ in until(lambda: not any(m.borrowed() for m in cluster.managers), 100):
    _wait(cluster)

  for owner, uid in ((0, UID), (1, UID + 1)):
    assert cluster.managers[owner].counts().used == 4
    assert cluster.covers(owner, uid, 4 * BLOCK_SIZE)
    assert cluster.managers[owner].spill(uid) is None
  assert cluster.gmanager.num_plans >= 1


def test_one_free_block_begins_a_rotation_and_none_leaves_it_as_it_is():
  # A moved rBlock has two copies until the new one is proved, so the first one
  # of a circle needs a free place at home. Nobody else may take it in: that
  # would be one more debt.
  cluster = _cluster(2, plan_every_s=1.0)
  for owner, uid in ((0, UID), (1, UID + 1)):
    cluster.open(owner, uid, 5 * BLOCK_SIZE)
    assert cluster.managers[owner].borrow(uid, 3)
    cluster.settle()
  for owner, manager in enumerate(cluster.managers):
    manager.open(UID + 2 + owner)
    assert manager.allocate(UID + 2 + owner, 3)
    assert manager.counts().free == 0
  declined = [manager.plans.num_declined for manager in cluster.managers]

  _wait(cluster, 12)

  assert [manager.borrowed() for manager in cluster.managers] == [
    {1: 3},
    {0: 3},
  ]
  assert all(
    manager.plans.num_declined > before
    for manager, before in zip(cluster.managers, declined, strict=True)
  )

  cluster.managers[1].close(UID + 3)
  assert cluster.managers[1].allocate(UID + 1, 2)
  assert [manager.counts().free for manager in cluster.managers] == [0, 1]

  for _ in until(lambda: not all(m.borrowed() for m in cluster.managers), 100):
    _wait(cluster)

  # What is left is no circle.
  assert [manager.borrowed() for manager in cluster.managers] == [{1: 1}, {}]

  for owner, uid in ((0, UID), (1, UID + 1)):
    assert cluster.covers(owner, uid, 5 * BLOCK_SIZE)


def test_a_chain_of_debts_stays():
  cluster = _cluster(2, plan_every_s=1.0)
  cluster.open(0, UID, 4 * BLOCK_SIZE)
  assert cluster.managers[0].borrow(UID, 3)

  _wait(cluster, 12)

  assert cluster.gmanager.num_plans >= 2
  assert cluster.managers[0].borrowed() == {1: 3}
