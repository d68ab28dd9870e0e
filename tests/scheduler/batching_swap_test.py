"""Preempted requests that wait in HOST.

An instance has 8 rBlocks of 8 tokens in HBM. Two prompts of 31 tokens fill it,
and 1's second token needs a ninth: request 2 makes way.
"""

import dataclasses

import pytest

from infinite_llm.config import SchedulerConfig
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.scheduler.step_plan import NOTHING, Ceiling, Row, StepPlan
from infinite_llm.scheduler.swapping import Stage
from infinite_llm.types import PoolCounts, Tier
from tests.scheduler.fake_cluster import FakeCluster, until
from tests.scheduler.fake_engine import FakeEngine, make_request

_SCHEDULER = SchedulerConfig(
  max_num_seqs=4,
  decode_buckets=(4,),
  prefill_buckets=(32,),
  prefill_rows=2,
  max_row_attempts=3,
)


def _engine(*, policy="swap", host_blocks=9, requests=((31, 9), (31, 4))):
  cluster = FakeCluster(
    1,
    9,
    policy=policy,
    host_blocks=host_blocks,
    group_prefill_buckets=(32,),
  )
  cluster.heartbeat()
  engine = FakeEngine(cluster, _SCHEDULER)
  for uid, (num_tokens, max_tokens) in enumerate(requests, start=1):
    engine.add(0, make_request(uid, num_tokens, max_tokens=max_tokens))
  engine.step()
  engine.step()
  return engine


def _row(uid, start, num_tokens, samples):
  return Row(uid=uid, start=start, num_tokens=num_tokens, samples=samples)


def _run_until_1_ended(engine):
  for _ in until(lambda: engine.requests[1].status.is_finished):
    engine.step()


def test_a_request_that_made_way_goes_on_from_where_it_was():
  engine = _engine()
  batcher, manager = engine.batchers[0], engine.cluster.managers[0]
  request = engine.requests[2]
  assert (request.num_computed_tokens, request.num_tokens) == (31, 32)
  assert manager.counts().free == 0

  engine.step()

  # Its last rBlock, not full, became free at once: 1 went on without a pause.
  assert engine.requests[1].num_computed_tokens == 33
  assert manager.swapping.stage(2) is Stage.LEAVING
  assert (request.status, request.num_computed_tokens) == (
    RequestStatus.WAITING,
    0,
  )
  assert manager.counts() == PoolCounts(
    used=8, free=0, hosted=0, reserved=0, total=8
  )
  _run_until_1_ended(engine)
  assert manager.swapping.stage(2) is Stage.WAITING
  engine.cluster.tick(0.2)
  assert batcher.plan() == StepPlan()
  assert [r.uid for r in batcher.running] == [2]
  assert manager.swapping.stage(2) is Stage.ENTERING
  engine.cluster.settle()
  assert batcher.plan() == StepPlan(local_prefill=(_row(2, 24, 8, True),))
  engine.run()
  assert request.output_token_ids == [31, 32, 33, 34]
  assert request.num_recomputed == engine.num_failed_rows == 0
  engine.cluster.check_empty()


@pytest.mark.parametrize("host_blocks", [0, 3])
def test_otherwise_it_is_computed_again(host_blocks):
  engine = _engine(host_blocks=host_blocks)
  engine.step()
  assert engine.cluster.managers[0].swapping.stage(2) is None
  assert engine.requests[2].status is RequestStatus.WAITING
  _run_until_1_ended(engine)

  plan = engine.batchers[0].plan()

  assert plan == StepPlan(local_prefill=(_row(2, 0, 32, True),))


def test_while_copies_make_room_nobody_else_is_preempted():
  engine = _engine(requests=((23, 20), (23, 20), (9, 20)))
  engine.cluster.is_copying = False
  batcher, manager = engine.batchers[0], engine.cluster.managers[0]
  # Of 3 + 3 + 2 rBlocks, request 1 gets the one of request 3 that is not full.
  # The other one is leaving when 2, then 1, need one more.
  for _ in range(12):
    engine.step()

  assert [r.num_computed_tokens for r in batcher.running] == [32, 24]
  assert [r.uid for r in batcher.waiting] == [3]
  assert manager.swapping.stage(3) is Stage.LEAVING
  engine.cluster.is_copying = True
  engine.run()
  assert all(
    r.status is RequestStatus.FINISHED_LENGTH for r in engine.requests.values()
  )
  engine.cluster.check_empty()


def test_a_request_that_fills_the_pool_comes_back_to_where_it_can_go_on():
  cluster = FakeCluster(
    2, 9, policy="borrow", host_blocks=9, group_prefill_buckets=(32,)
  )
  cluster.introduce()
  cluster.heartbeat()
  engine = FakeEngine(cluster, _SCHEDULER)
  batcher, manager = engine.batchers[0], cluster.managers[0]
  request = engine.add(0, make_request(1, 80))
  for _ in until(lambda: request.num_computed_tokens == 64):
    engine.step()
  assert manager.counts().free == 0
  assert manager.spill(1) is None

  batcher.set_aside(1)

  # The 8th rBlock is free at once, and there to be written to afterwards.
  assert manager.swapping.stage(1) is Stage.LEAVING
  assert (manager.counts().used, manager.counts().free) == (7, 1)
  assert manager.counts(Tier.HOST).reserved == 7
  engine.run()
  assert request.output_token_ids == [80, 81, 82, 83]
  cluster.check_empty()


@pytest.mark.parametrize("between", [(), (Ceiling(group=NOTHING, long=False),)])
def test_who_made_way_is_not_let_in_again_before_the_one_that_needed_it(
  between,
):
  """Not on the strength of room elsewhere: copies take rBlocks of its own."""
  cluster = FakeCluster(
    3,
    6,
    policy="borrow",
    host_blocks=9,
    spill_slots=1,
    group_prefill_buckets=(32,),
  )
  cluster.introduce()
  cluster.heartbeat()
  scheduler = dataclasses.replace(_SCHEDULER, prefill_buckets=(40,))
  engine = FakeEngine(cluster, scheduler)
  manager = cluster.managers[0]
  engine.add(0, make_request(2, 32))
  engine.add(0, make_request(3, 8))
  engine.step()
  # All that 2 has goes elsewhere, and takes the only slot: 1, which came first
  # and is larger than the pool, cannot borrow, so that 3 makes way for it.
  assert manager.move_kvcache(2, 4, 1)
  cluster.settle()
  cluster.heartbeat()
  oldest = engine.add(0, make_request(1, 61))
  manager.allotted_to = 1
  engine.step(0.0)
  assert manager.swapping.stage(3) is Stage.LEAVING
  assert (oldest.num_computed_tokens, manager.counts().free) == (32, 0)
  cluster.heartbeat()
  assert manager.allotted_to == 3
  assert manager.counts().free == 1

  for ceiling in between:  # The oldest one must wait for a turn.
    assert engine.batchers[0].plan(ceiling) == StepPlan()
    assert manager.swapping.stage(3) is Stage.WAITING
  engine.step()

  assert oldest.num_computed_tokens == 40
  assert manager.swapping.stage(3) is Stage.WAITING
  engine.run()
  assert all(
    r.status is RequestStatus.FINISHED_LENGTH for r in engine.requests.values()
  )
  cluster.check_empty()


def test_what_those_under_way_lack_next_stays_free_too():
  engine = _engine(requests=((30, 9), (31, 4)))
  batcher, manager = engine.batchers[0], engine.cluster.managers[0]
  batcher.set_aside(2)
  engine.cluster.settle()
  assert manager.pool.allocate(1, 99)  # Of 4 that are free; 3 are needed.
  assert batcher.plan() == StepPlan(local_decode=(_row(1, 31, 1, True),))
  manager.allotted_to = 2
  manager._lendable_elsewhere = 8

  batcher.plan(Ceiling(is_behind=True))

  assert [r.uid for r in batcher.running] == [1]
  assert manager.swapping.stage(2) is Stage.WAITING


@pytest.mark.parametrize(
  "stage", [Stage.LEAVING, Stage.WAITING, Stage.ENTERING, Stage.UNPROVED]
)
def test_it_can_be_aborted_at_any_time(stage):
  engine = _engine()
  batcher, manager = engine.batchers[0], engine.cluster.managers[0]
  engine.step()
  if stage is not Stage.LEAVING:
    _run_until_1_ended(engine)
  if stage in (Stage.ENTERING, Stage.UNPROVED):
    batcher.plan()
  if stage is Stage.UNPROVED:
    engine.cluster.settle()
  assert manager.swapping.stage(2) is stage

  batcher.abort(2)

  assert manager.swapping.stage(2) is None
  engine.run()
  assert engine.requests[2].status is RequestStatus.FINISHED_ABORTED
  engine.cluster.check_empty()


def test_lost_copies_cost_a_recomputation_and_no_token():
  engine = _engine()
  engine.step()
  engine.cluster.settle()
  engine.cluster.devices[0].host_tag[2] = 0

  engine.run()

  request = engine.requests[2]
  assert request.status is RequestStatus.FINISHED_LENGTH
  assert request.output_token_ids == [31, 32, 33, 34]
  assert (engine.num_failed_rows, request.num_recomputed) == (1, 1)
  engine.cluster.check_empty()
