"""Plans for a step that is launched while the one before is under way."""

from infinite_llm.config import SchedulerConfig
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.scheduler.step_plan import NOTHING, Ceiling, Row, StepPlan
from tests.scheduler.fake_cluster import FakeCluster
from tests.scheduler.fake_engine import FakeEngine, make_request

_BEHIND = Ceiling(group=NOTHING, is_behind=True)


def _engine(num_blocks=17, num_instances=1, **lending) -> FakeEngine:
  """Instances of 16 rBlocks of 8 tokens each; chunks of 32 tokens."""
  cluster = FakeCluster(num_instances, num_blocks, **lending)
  cluster.heartbeat()
  return FakeEngine(
    cluster,
    SchedulerConfig(
      max_num_seqs=3,
      decode_buckets=(4,),
      prefill_buckets=(32,),
      prefill_rows=2,
      max_row_attempts=3,
    ),
  )


def _row(uid, start, num_tokens, samples) -> Row:
  return Row(uid=uid, start=start, num_tokens=num_tokens, samples=samples)


def _commit(engine, plan, is_proved=True) -> None:
  for row in plan.rows:
    engine.cluster.write(0, row.uid, row.start, row.end)
    engine._commit(0, row, is_proved)


def test_rows_under_way_are_taken_for_done():
  engine = _engine()
  engine.add(0, make_request(1, 40, max_tokens=3))
  batcher = engine.batchers[0]
  plans = [batcher.plan()]
  while plans[-1].rows:
    plans.append(batcher.plan(_BEHIND))
    _commit(engine, plans[-2])
  assert plans == [
    StepPlan(local_prefill=(_row(1, 0, 32, False),)),
    StepPlan(local_prefill=(_row(1, 32, 8, True),)),
    StepPlan(local_decode=(_row(1, 40, 1, True),)),
    StepPlan(local_decode=(_row(1, 41, 1, True),)),
    StepPlan(),  # The token of the last one is the third.
  ]
  assert engine.requests[1].status is RequestStatus.FINISHED_LENGTH


def test_others_are_let_in_beside_them():
  engine = _engine()
  engine.add(0, make_request(1, 20))
  batcher = engine.batchers[0]
  first = batcher.plan()
  engine.add(0, make_request(2, 10))
  second = batcher.plan(_BEHIND)
  assert second == StepPlan(
    local_decode=(_row(1, 20, 1, True),), local_prefill=(_row(2, 0, 10, True),)
  )
  _commit(engine, first)
  _commit(engine, second)
  engine.run()


def test_nobody_gives_way_to_a_row_that_lacks_room():
  engine = _engine(num_blocks=6)  # 40 tokens
  older = engine.add(0, make_request(1, 15, max_tokens=20))
  engine.add(0, make_request(2, 15, max_tokens=20))
  batcher = engine.batchers[0]
  plan = batcher.plan()
  while not batcher.is_held:
    behind = batcher.plan(_BEHIND)
    _commit(engine, plan)
    plan = behind
  assert [request.uid for request in batcher.running] == [1, 2]
  # The older one has the last rBlock; no step is for it alone.
  assert plan == StepPlan()
  assert engine.cluster.managers[0].pool.num_free == 0
  before = older.num_computed_tokens
  plan = batcher.plan()  # Now nothing is under way.
  assert not batcher.is_held
  assert plan.local_decode[0] == _row(1, before, 1, True)
  _commit(engine, plan)
  engine.run()


def test_after_a_row_that_failed_the_next_plan_waits():
  engine = _engine()
  request = engine.add(0, make_request(1, 20))
  batcher = engine.batchers[0]
  first, second = batcher.plan(), batcher.plan(_BEHIND)
  assert second.rows
  engine._commit(0, first.rows[0], False)
  assert batcher.is_held
  assert request.num_computed_tokens == 0
  # The one behind it is stale by now; it is left alone.
  assert second.rows[0].start != request.num_computed_tokens
  assert batcher.plan(_BEHIND) == StepPlan()
  engine.run()
  assert request.status is RequestStatus.FINISHED_LENGTH


def test_who_is_let_in_begins_anew():
  engine = _engine()
  request = make_request(1, 20)
  request.num_launched_tokens = 19  # Of another instance.
  engine.add(0, request)
  plan = engine.batchers[0].plan()
  assert plan == StepPlan(local_prefill=(_row(1, 0, 20, True),))


def test_what_is_lost_is_not_passed_over(monkeypatch):
  engine = _engine()
  for uid in (1, 2):
    engine.add(0, make_request(uid, 10))
  batcher = engine.batchers[0]
  batcher.plan()
  monkeypatch.setattr(engine.cluster.managers[0], "lost", lambda: (1,))
  assert batcher.plan(_BEHIND) == StepPlan()
  assert batcher.is_held


def test_who_was_preempted_begins_anew():
  engine = _engine()
  request = engine.add(0, make_request(1, 20))
  batcher = engine.batchers[0]
  first = batcher.plan()
  second = batcher.plan(_BEHIND)
  assert second.rows
  _commit(engine, first)
  batcher.preempt(1)
  assert batcher.is_held
  assert (request.num_computed_tokens, request.num_coming_tokens) == (0, 21)
  assert batcher.plan() == StepPlan(local_prefill=(_row(1, 0, 21, True),))


def test_rblocks_elsewhere_are_not_for_such_a_plan():
  engine = _engine(num_blocks=9, num_instances=2, group_prefill_buckets=(32,))
  request = engine.add(0, make_request(1, 80, max_tokens=8))
  batcher = engine.batchers[0]
  while request.num_tokens < 83:
    engine.step()
  plan = batcher.plan()
  assert plan.group_decode
  assert batcher.plan(_BEHIND) == StepPlan()
  assert batcher.is_held
  engine.run()
  assert request.status is RequestStatus.FINISHED_LENGTH
