"""Each mishap once: what the managers do where something may fail at any time.

The deaths among them are tried in the fault simulation.
"""

import pytest

from infinite_llm.config import SchedulerConfig
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.step_plan import Row, StepPlan
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster
from tests.scheduler.fake_engine import FakeEngine, make_request

UID = 7


class _Once:
  """Has one kind of mishap happen, the next time that it can."""

  def __init__(self):
    self.next = None

  def __call__(self, point):
    is_next = point == self.next
    if is_next:
      self.next = None
    return is_next


@pytest.fixture
def faults():
  return _Once()


def _cluster(faults, **options):
  cluster = FakeCluster(3, 9, faults=faults, **options)
  cluster.introduce()
  cluster.heartbeat()
  return cluster


def test_an_allocation_that_fails_costs_no_more_than_some_room(faults):
  cluster = _cluster(faults, group_prefill_buckets=(32,))
  scheduler = SchedulerConfig(
    max_num_seqs=4,
    decode_buckets=(4,),
    prefill_buckets=(32,),
    prefill_rows=2,
  )
  engine = FakeEngine(cluster, scheduler)
  request = engine.add(0, make_request(1, 12))
  faults.next = Mishap.ALLOCATION_FAILS

  plan = engine.batchers[0].plan()

  # 8 rBlocks are free and 2 needed: the second attempt takes no more.
  assert plan == StepPlan(
    local_prefill=(Row(uid=1, start=0, num_tokens=12, samples=True),)
  )
  assert cluster.managers[0].counts().free == 6
  engine.run()
  assert request.output_token_ids == [12, 13, 14, 15]


@pytest.mark.parametrize(("wanted", "granted"), [(5, 2), (1, 0)])
def test_a_creditor_may_grant_less_than_it_could(faults, wanted, granted):
  cluster = _cluster(faults)
  cluster.open(0, UID, 6 * BLOCK_SIZE)
  manager = cluster.managers[0]
  faults.next = Mishap.GRANT_FAILS

  assert manager.move_kvcache(UID, wanted, 1)
  cluster.settle()

  assert manager.borrowed().get(1, 0) == granted
  assert cluster.managers[1].lent().get(0, 0) == granted
  assert cluster.covers(0, UID, 6 * BLOCK_SIZE)


def test_what_finds_no_room_in_host_is_computed_again(faults):
  cluster = _cluster(faults, policy="swap", host_blocks=9)
  cluster.open(0, UID, 3 * BLOCK_SIZE)
  manager = cluster.managers[0]
  faults.next = Mishap.SWAP_FAILS

  assert not manager.swapping.swap_out(UID)
  assert manager.swapping.counts().used == 0
  assert cluster.covers(0, UID, 3 * BLOCK_SIZE)
  assert manager.swapping.swap_out(UID)


def test_a_heartbeat_that_was_skipped_comes_with_the_next_tick(faults):
  cluster = _cluster(faults)
  manager = cluster.managers[0]
  cluster.now_s += cluster.lending.heartbeat_every_s
  faults.next = Mishap.HEARTBEAT_SKIPPED

  manager.tick()
  assert manager.drain_messages() == []
  manager.tick()
  assert len(manager.drain_messages()) == 1


def test_whom_nobody_is_proposed_to_does_not_ask_again_at_once(faults):
  cluster = _cluster(faults)
  cluster.open(0, UID, 6 * BLOCK_SIZE)
  manager = cluster.managers[0]
  faults.next = Mishap.RANKING_FAILS

  assert manager.borrow(UID, 2)
  cluster.settle()
  assert manager.borrowed() == {}
  assert not manager.borrow(UID, 2)

  cluster.heartbeat()
  assert manager.borrow(UID, 2)
  cluster.settle()
  assert sum(manager.borrowed().values()) == 2
