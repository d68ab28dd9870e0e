import pytest

from infinite_llm.config import SchedulerConfig
from infinite_llm.errors import CoverageError, InvariantError
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.scheduler.step_plan import NOTHING, Ceiling, Row, StepPlan
from tests.scheduler.fake_cluster import FakeCluster, until
from tests.scheduler.fake_engine import FakeEngine, make_request

_CHUNK = 32  # four rBlocks


def _engine(num_instances=1, num_blocks=17, *, scheduler=None, **lending):
  """Instances of 16 rBlocks of 8 tokens each; chunks of 32 tokens."""
  config = SchedulerConfig(
    **{
      "max_num_seqs": 4,
      "decode_buckets": (4,),
      "prefill_buckets": (_CHUNK,),
      "prefill_rows": 2,
      "max_row_attempts": 3,
      **(scheduler or {}),
    }
  )
  lending = {"group_prefill_buckets": (_CHUNK,)} | lending
  cluster = FakeCluster(num_instances, num_blocks, **lending)
  cluster.heartbeat()
  return FakeEngine(cluster, config)


def _row(uid, start, num_tokens, samples):
  return Row(uid=uid, start=start, num_tokens=num_tokens, samples=samples)


class TestFrost:
  def test_a_frozen_instance_preempts_and_admits_nobody(self):
    engine = _engine(num_blocks=9)
    engine.add(0, make_request(1, 36, max_tokens=20))
    engine.add(0, make_request(2, 24, max_tokens=8))
    engine.step()
    engine.step()
    batcher = engine.batchers[0]
    engine.add(0, make_request(3, 1))
    engine.cluster.managers[0].plans.freeze(1.0)
    while True:
      plan = batcher.plan()
      if not plan.rows:
        break
      for row in plan.rows:  # What their last rBlocks still hold.
        engine.cluster.write(0, row.uid, row.start, row.end)
        engine._commit(0, row, True)

    assert [r.uid for r in batcher.running] == [1, 2]
    assert [r.num_computed_tokens for r in batcher.running] == [40, 24]
    assert [r.uid for r in batcher.waiting] == [3]
    engine.run()
    assert all(r.status.is_finished for r in engine.requests.values())


class TestRows:
  def test_a_prompt_is_computed_in_chunks_and_samples_at_its_end(self):
    engine = _engine()
    engine.add(0, make_request(1, 70, max_tokens=3))
    batcher = engine.batchers[0]

    plans = []
    for _ in until(lambda: not engine.has_work):
      plans.append(batcher.plan())
      for row in plans[-1].rows:
        engine.cluster.write(0, row.uid, row.start, row.end)
        engine._commit(0, row, True)

    assert plans == [
      StepPlan(local_prefill=(_row(1, 0, 32, False),)),
      StepPlan(local_prefill=(_row(1, 32, 32, False),)),
      StepPlan(local_prefill=(_row(1, 64, 6, True),)),
      StepPlan(local_decode=(_row(1, 70, 1, True),)),
      StepPlan(local_decode=(_row(1, 71, 1, True),)),
    ]

  def test_prompts_share_a_chunk_and_its_rows(self):
    engine = _engine()
    for uid, num_tokens in ((1, 20), (2, 20), (3, 4)):
      engine.add(0, make_request(uid, num_tokens))

    plan = engine.batchers[0].plan()

    # Request 2 gets the rest of the chunk; two rows are the most.
    assert plan == StepPlan(
      local_prefill=(_row(1, 0, 20, True), _row(2, 0, 12, False))
    )

  def test_decode_and_prefill_go_side_by_side(self):
    engine = _engine()
    engine.add(0, make_request(1, 5))
    engine.step()
    engine.add(0, make_request(2, 9))

    assert engine.batchers[0].plan() == StepPlan(
      local_decode=(_row(1, 5, 1, True),),
      local_prefill=(_row(2, 0, 9, True),),
    )

  def test_a_prompt_of_one_token_is_a_decode_row(self):
    engine = _engine()
    engine.add(0, make_request(1, 1))

    plan = engine.batchers[0].plan()

    assert plan == StepPlan(local_decode=(_row(1, 0, 1, True),))

  def test_planned_rows_have_their_blocks(self):
    engine = _engine()
    engine.add(0, make_request(1, 20))
    manager = engine.cluster.managers[0]

    engine.batchers[0].plan()

    assert manager.table(1).num_blocks == 3
    assert manager.counts().reserved == 3
    engine.batchers[0].advance(_row(1, 0, 20, True))
    assert manager.counts().used == 3

  def test_a_request_with_blocks_elsewhere_goes_to_group_programs(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 60))
    engine.add(0, make_request(2, 8))
    engine.step()
    assert engine.cluster.managers[0].borrow(1, 2)
    engine.cluster.settle()

    assert engine.batchers[0].plan() == StepPlan(
      local_prefill=(_row(2, 0, 8, True),),
      group_prefill=(_row(1, 32, 28, True),),
    )

  def test_one_group_prefill_row_at_a_time_and_the_older_first(self):
    engine = _engine(2, num_blocks=33)
    for uid in (1, 2):
      engine.add(0, make_request(uid, 120))
    for uid in (1, 2):  # each has a chunk at home before it has to move
      engine.step()
      assert engine.cluster.managers[0].borrow(uid, 1)
      engine.cluster.settle()

    plan = engine.batchers[0].plan()

    assert plan == StepPlan(group_prefill=(_row(1, 64, 32, False),))

  def test_a_request_that_cannot_be_read_has_no_row(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 60))
    engine.step()
    manager = engine.cluster.managers[0]
    assert manager.borrow(1, 2)
    engine.cluster.settle()
    manager.reconcile(1)
    assert not manager.is_readable(1)

    assert engine.batchers[0].plan() == StepPlan()

    engine.cluster.settle()
    assert len(engine.batchers[0].plan().group_prefill) == 1


class TestAdmission:
  def test_requests_are_let_in_in_order_while_they_fit(self):
    engine = _engine()
    for uid, num_tokens in ((1, 90), (2, 60), (3, 8)):  # 12 + 8 > 16 rBlocks
      engine.add(0, make_request(uid, num_tokens))
    batcher = engine.batchers[0]
    batcher.plan()

    # Request 3 would fit but does not overtake request 2.
    assert [r.uid for r in batcher.running] == [1]
    assert [r.uid for r in batcher.waiting] == [2, 3]
    assert batcher.running[0].status is RequestStatus.RUNNING

  def test_the_gmanager_hears_who_waits_and_for_how_much(self):
    engine = _engine()
    for uid, num_tokens in ((1, 90), (2, 60), (3, 8)):  # 12 + 8 > 16 rBlocks
      engine.add(0, make_request(uid, num_tokens))

    engine.step()
    engine.cluster.heartbeat()

    (line,) = engine.cluster.gmanager.view().lines
    assert (line.num_running, line.num_waiting, line.next_blocks) == (1, 2, 8)

  def test_blocks_that_running_prompts_still_need_are_not_given_away(self):
    engine = _engine()
    engine.add(0, make_request(1, 100))
    engine.step()  # 4 of its 13 rBlocks are taken
    engine.add(0, make_request(2, 40))

    engine.batchers[0].plan()

    assert [r.uid for r in engine.batchers[0].running] == [1]

  def test_room_elsewhere_counts_when_it_can_be_borrowed(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 200))  # 25 rBlocks of 16 and 16
    batcher = engine.batchers[0]
    assert batcher.plan() == StepPlan()  # The gManager is to decide.
    engine.cluster.heartbeat()
    batcher.plan()
    assert [r.uid for r in batcher.running] == [1]

    engine = _engine(2, policy="static")
    engine.add(0, make_request(1, 200))
    batcher = engine.batchers[0]
    batcher.plan()
    engine.cluster.heartbeat()
    batcher.plan()
    assert batcher.running == ()

  def test_a_request_that_its_own_pool_can_hold_waits_for_it(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 90))  # 12 of 16 rBlocks
    engine.add(0, make_request(2, 60))  # 8, and instance 1 has 16
    for _ in range(3):
      engine.step()

    assert [r.uid for r in engine.batchers[0].running] == [1]
    engine.run()
    assert engine.requests[2].status is RequestStatus.FINISHED_LENGTH
    assert engine.cluster.managers[1].lent() == {}

  def test_a_short_request_does_not_wait_for_a_long_one_to_end(self):
    engine = _engine(3)
    long = engine.add(0, make_request(1, 200, max_tokens=60))
    short = engine.add(0, make_request(2, 40))
    for _ in until(lambda: short.status.is_finished):
      engine.step()

    assert not long.status.is_finished
    engine.run()
    engine.cluster.check_empty()

  def test_two_requests_do_not_come_in_for_the_same_rblocks(self):
    engine = _engine(3)  # 48 rBlocks in all; each request needs 30.
    for instance in (0, 1):
      request = make_request(1 + instance, 236, max_tokens=4)
      engine.add(instance, request)
    for _ in range(3):
      engine.step()

    assert [r.uid for r in engine.batchers[0].running] == [1]
    assert engine.batchers[1].running == ()
    first = engine.requests[1]
    for _ in until(lambda: first.status.is_finished):
      engine.step()
      assert engine.batchers[1].running == ()
    engine.run()
    assert engine.requests[2].status is RequestStatus.FINISHED_LENGTH
    engine.cluster.check_empty()

  def test_room_that_is_allotted_to_another_request_is_not_used(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 200))
    batcher = engine.batchers[0]
    batcher.plan()
    engine.cluster.heartbeat()
    assert engine.cluster.managers[0].allotted_to == 1

    batcher.abort(1)
    engine.add(0, make_request(2, 200))
    batcher.plan()

    assert batcher.running == ()

  def test_what_running_prompts_are_to_get_is_not_lent(self):
    engine = _engine(2)
    manager = engine.cluster.managers[0]
    engine.add(0, make_request(1, 100))  # 13 of 16 rBlocks
    engine.step()  # 4 of them
    engine.cluster.heartbeat()

    (line, _) = engine.cluster.gmanager.view().lines
    assert (line.free, line.promised, line.lendable) == (12, 9, 3)
    assert engine.cluster.managers[1].lendable_elsewhere() == 3
    engine.run()
    engine.cluster.heartbeat()
    assert manager.counts().free == 16
    assert engine.cluster.managers[1].lendable_elsewhere() == 16

  def test_one_that_stands_aside_is_not_overtaken(self):
    """Who comes behind it would take what it gave up for others."""
    engine = _engine()
    batcher = engine.batchers[0]
    for uid in (1, 2, 3):
      engine.add(0, make_request(uid, 8))
    batcher.plan()
    engine.add(0, make_request(4, 8))
    batcher.preempt(2)
    engine.requests[2].stands_aside = True
    batcher.plan()
    assert [r.uid for r in batcher.running] == [1, 3]
    assert [r.uid for r in batcher.waiting] == [2, 4]
    engine.requests[2].stands_aside = False
    batcher.plan()
    assert [r.uid for r in batcher.running] == [1, 2, 3, 4]

  def test_no_more_run_than_the_configuration_says(self):
    engine = _engine(scheduler={"max_num_seqs": 2})
    for uid in (1, 2, 3):
      engine.add(0, make_request(uid, 4))
    engine.batchers[0].plan()

    assert len(engine.batchers[0].running) == 2


class TestShortage:
  def test_a_prompt_larger_than_the_pool_moves_out_as_it_goes(self):
    engine = _engine(2, num_blocks=17)
    request = engine.add(0, make_request(1, 200, max_tokens=5))
    for _ in until(lambda: request.num_computed_tokens >= 192):
      engine.step()
      assert request.attempts == 0

    # 24 rBlocks so far, of which at most 16 are at home.
    assert engine.cluster.managers[0].borrowed() == {1: 8}
    engine.run()
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert len(request.output_token_ids) == 5
    engine.cluster.check_empty()

  def test_the_row_is_left_out_while_room_is_being_made(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 200))
    batcher, manager = engine.batchers[0], engine.cluster.managers[0]
    for _ in range(5):  # One for the gManager to let it in.
      engine.step()  # 128 tokens: the pool is full

    assert batcher.plan() == StepPlan()
    assert manager.is_borrowing()
    assert batcher.plan() == StepPlan()

    engine.cluster.settle()
    # Two chunks' worth moved, so that one borrow serves several steps.
    assert manager.borrowed() == {1: 8}
    assert batcher.plan().group_prefill == (_row(1, 128, 32, False),)

  def test_nobody_is_asked_for_a_step_while_room_is_being_made(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 200))
    batcher, manager = engine.batchers[0], engine.cluster.managers[0]
    for _ in until(lambda: manager.borrowed() == {1: 8}):
      engine.step()
    for _ in until(lambda: manager.pool.num_free < 4):
      engine.step()
    asked = batcher.group_work({})
    assert asked.prefill_tokens > 0

    # The step is taken, but there is no room: it begins to borrow.
    assert batcher.plan(Ceiling(group=asked)) == StepPlan()
    assert manager.is_borrowing()
    assert batcher.group_work({}) == NOTHING
    engine.cluster.settle()
    asked = batcher.group_work({})
    assert asked.prefill_tokens > 0
    assert len(batcher.plan(Ceiling(group=asked)).group_prefill) == 1

  @pytest.mark.parametrize(
    ("buckets", "num_tokens"),
    # Group chunks have 32. A program of 64 takes as long with 32 as with 60.
    [((8, 32, 64), 32), ((8, 48, 64), 48), ((8, 64), 60)],
  )
  def test_prompts_go_in_short_chunks_where_others_wait_for_them(
    self, buckets, num_tokens
  ):
    engine = _engine(2, scheduler={"prefill_buckets": buckets})
    engine.add(0, make_request(1, 80))
    engine.step()
    engine.add(1, make_request(2, 60))
    assert engine.batchers[1].plan().rows == (_row(2, 0, 60, True),)

    assert engine.cluster.managers[0].borrow(1, 2)
    engine.cluster.settle()

    # Instance 1 hosts for 0 now.
    assert engine.batchers[1].plan().rows == (
      _row(2, 0, num_tokens, num_tokens == 60),
    )

  @pytest.mark.parametrize(
    ("token_s", "num_tokens"),
    [
      (0.0, 64),  # Not measured, or by a clock that stands still.
      (0.5 / 40, 40),
      (0.5 / 64, 64),
      (0.5 / 1000, 64),
      (0.5 / 17, 17),
      (100.0, 16),
    ],
  )
  def test_a_group_chunk_is_as_long_as_the_last_one_allows(
    self, token_s, num_tokens
  ):
    engine = _engine(2, group_prefill_buckets=(16, 64), group_chunk_s=0.5)
    request = engine.add(0, make_request(1, 220))
    batcher, manager = engine.batchers[0], engine.cluster.managers[0]
    for _ in range(5):  # One for the gManager to let it in.
      engine.step()
    assert batcher.plan() == StepPlan()
    engine.cluster.settle()
    assert manager.borrowed() == {1: 8}
    request.group_token_s = token_s
    row = _row(1, 128, num_tokens, False)
    assert batcher.plan() == StepPlan(group_prefill=(row,))

  def test_a_large_local_program_makes_no_large_borrow(self):
    engine = _engine(2, scheduler={"prefill_buckets": (128,)})
    engine.add(0, make_request(1, 120, max_tokens=20))
    manager = engine.cluster.managers[0]
    for _ in until(lambda: manager.borrowed()):
      engine.step()
    assert manager.borrowed() == {1: 8}  # Two group chunks of 32 tokens.

  def test_the_longest_request_makes_room_for_the_others(self):
    engine = _engine(2)
    engine.add(0, make_request(1, 96, max_tokens=30))
    engine.add(0, make_request(2, 24, max_tokens=30))
    for _ in range(4):
      engine.step()
    manager = engine.cluster.managers[0]
    assert manager.counts().free == 0
    engine.add(0, make_request(3, 24, max_tokens=30))
    for _ in range(3):
      engine.step()

    assert manager.spill(1) is not None
    assert manager.spill(2) is None
    assert manager.spill(3) is None
    assert engine.requests[3].num_computed_tokens >= 24

  def test_the_youngest_is_preempted_when_borrowing_is_impossible(self):
    engine = _engine(1, num_blocks=6, scheduler={"prefill_rows": 3})
    requests = [
      engine.add(0, make_request(uid, num_tokens, max_tokens=9))
      for uid, num_tokens in ((1, 15), (2, 8), (3, 8))
    ]
    for _ in range(2):  # 2 + 2 + 1 rBlocks of 5, and request 3 needs another
      engine.step()
    batcher = engine.batchers[0]
    assert [r.num_computed_tokens for r in requests] == [16, 9, 8]

    engine.step()  # request 1 needs a third one

    assert [r.uid for r in batcher.running] == [1, 2]
    assert [r.uid for r in batcher.waiting] == [3]
    assert requests[2].status is RequestStatus.WAITING
    assert requests[2].num_computed_tokens == 0
    assert requests[2].output_token_ids  # kept; only its KV is computed again
    engine.run()
    assert all(len(r.output_token_ids) == 9 for r in requests)
    engine.cluster.check_empty()

  def test_rblocks_that_a_failed_step_left_are_used_when_there_are_no_more(
    self,
  ):
    engine = _engine(
      1, num_blocks=6, policy="static", scheduler={"prefill_buckets": (64,)}
    )
    request = engine.add(0, make_request(1, 38, max_tokens=9))
    batcher = engine.batchers[0]
    # All five rBlocks there are, for a step that is not proved: none is free.
    assert batcher.plan().rows == (_row(1, 0, 38, True),)
    assert engine.cluster.managers[0].pool.num_free == 0
    request.output_token_ids += [1, 2, 3]  # 41 tokens need six

    assert batcher.plan().rows == (_row(1, 0, 40, False),)

  def test_a_request_never_preempts_an_older_one(self):
    engine = _engine(1, num_blocks=5)  # 4 rBlocks
    first = engine.add(0, make_request(1, 17, max_tokens=7))
    second = engine.add(0, make_request(2, 8, max_tokens=8))
    engine.step()

    for _ in until(lambda: first.status.is_finished):
      engine.step()
      assert first.num_computed_tokens > 0
      assert second.num_computed_tokens <= 8
    engine.run()
    assert second.status is RequestStatus.FINISHED_LENGTH

  def test_what_is_free_is_used_when_no_more_is_to_be_had(self):
    engine = _engine(1, num_blocks=4, policy="static")  # 3 rBlocks
    engine.add(0, make_request(1, 24))
    engine.batchers[0]._admit()
    engine.cluster.managers[0].allocate(1, 1)
    engine.cluster.managers[0].open(9)
    engine.cluster.managers[0].allocate(9, 1)

    plan = engine.batchers[0].plan()

    assert plan.local_prefill == (_row(1, 0, 16, False),)


class TestFailures:
  def test_a_row_that_fails_did_not_happen(self):
    engine = _engine(2)
    request = engine.add(0, make_request(1, 60))
    engine.step()
    assert engine.cluster.managers[0].borrow(1, 2)
    engine.cluster.settle()
    (row,) = engine.batchers[0].plan().rows
    engine.batchers[0].row_failed(row)
    engine.cluster.settle()

    assert request.num_computed_tokens == 32
    assert request.attempts == 1
    assert engine.batchers[0].plan().rows == (row,)

  def test_kv_that_is_gone_is_recomputed(self):
    engine = _engine()
    request = engine.add(0, make_request(1, 60, max_tokens=3))
    engine.step()
    engine.cluster.devices[0].tag[1] = 0
    engine.step()

    assert request.status is RequestStatus.WAITING
    assert request.num_computed_tokens == 0
    assert engine.cluster.managers[0].counts().free == 16
    engine.run()
    assert len(request.output_token_ids) == 3
    assert engine.num_failed_rows == 1

  def test_a_request_is_not_computed_anew_for_every_token(self):
    engine = _engine(2)
    request = engine.add(0, make_request(1, 200, max_tokens=50))
    batcher = engine.batchers[0]
    lost = []
    for _ in until(lambda: request.status.is_finished):
      engine.cluster.heartbeat()
      engine.cluster.proved[1] = request.num_computed_tokens
      for row in batcher.plan().group_decode:  # Never proved.
        lost.append(row.start)
        engine._commit(0, row, False)
        break
      else:
        engine.step()

    # Each of three recomputations gave one token.
    assert sorted(set(lost)) == [200, 201, 202, 203]
    assert request.status is RequestStatus.FAILED
    assert isinstance(request.error, CoverageError)
    message = r"compute its KV anew 4 times since token 200, the last one 203;"
    with pytest.raises(CoverageError, match=message):
      raise request.error
    assert len(request.output_token_ids) == 4
    engine.cluster.heartbeat()
    engine.cluster.check_empty()

  def test_progress_forgives_recomputations(self):
    engine = _engine()
    request = engine.add(0, make_request(1, 20, max_tokens=100))
    for furthest in (0, 0, 30, 100, 101, 110):
      request.furthest_tokens = furthest
      engine.batchers[0]._admit()
      engine.batchers[0]._recompute(request)
    assert request.status is RequestStatus.WAITING
    assert (request.num_recomputed, request.recomputed_from) == (3, 100)

  def test_after_enough_failures_without_progress_a_request_fails(self):
    engine = _engine()
    request = engine.add(0, make_request(1, 60))
    other = engine.add(0, make_request(2, 20))
    for _ in until(lambda: request.status.is_finished):
      if request.num_computed_tokens:
        engine.cluster.devices[0].tag[1] = 0  # whenever it got that far again
      engine.step()

    assert request.status is RequestStatus.FAILED
    assert isinstance(request.error, CoverageError)
    assert str(request.error) == (
      "Request request-1 on instance 0 could not prove its KV intact 4 times"
      " since token 32; max_row_attempts is 3."
    )
    engine.run()
    assert other.status is RequestStatus.FINISHED_LENGTH
    engine.cluster.check_empty()

  def test_progress_forgives_earlier_failures(self):
    engine = _engine()
    request = engine.add(0, make_request(1, 200 - 80, max_tokens=3))
    failures = 0
    for _ in until(lambda: request.status.is_finished):
      if request.num_computed_tokens > 32 * failures and failures < 4:
        failures += 1
        engine.cluster.devices[0].tag[1] = 0
      engine.step()

    assert failures == engine.num_failed_rows == 4
    assert request.status is RequestStatus.FINISHED_LENGTH


class TestEnds:
  def test_requests_can_end_while_waiting_or_running(self):
    engine = _engine()
    waiting = engine.add(0, make_request(1, 200))  # can never run here
    batcher = engine.batchers[0]
    batcher.abort(1)
    running = engine.add(0, make_request(2, 20))
    failing = engine.add(0, make_request(3, 20))
    batcher.plan()
    error = RuntimeError("no")
    batcher.abort(2)
    batcher.fail(3, error)

    assert waiting.status is running.status is RequestStatus.FINISHED_ABORTED
    assert (failing.status, failing.error) == (RequestStatus.FAILED, error)
    assert not engine.has_work
    engine.cluster.check_empty()

  def test_an_unknown_request_and_an_unfinished_status_are_bugs(self):
    batcher = _engine().batchers[0]
    with pytest.raises(InvariantError, match=r"Request 1 is not on instance 0"):
      batcher.abort(1)
    with pytest.raises(InvariantError, match=r"status must be a finished one"):
      batcher.finish(1, RequestStatus.RUNNING)
