"""Process 0 of a group: what it makes of what members say.

The members are not there: a test says what they would.
"""

import dataclasses
import types

import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.group_link import LeaderLink
from infinite_llm.distributed.group_messages import (
  Abort,
  ComeBack,
  GiveUp,
  OutputNews,
  Outputs,
  Submit,
)
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.step_header import GroupWork, StepHeader
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.group_engine import GroupEngine
from infinite_llm.engine.in_flight import is_computed
from infinite_llm.engine.stall import REPORT_EVERY_S
from infinite_llm.errors import RequestError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.step_plan import StepPlan
from infinite_llm.types import PoolCounts
from tests.testing import SMALL_ENGINE, write_shallow_checkpoint

_PROMPT = (5, 6, 7)


class _Link(LeaderLink):
  """No stream at all.

  Attributes:
    said: What was sent to members.
    heard: What they are to have said.
  """

  def __init__(self):
    self.said = []
    self.heard = []

  def send(self, process, message):
    self.said.append((process, message))

  def broadcast(self, message):
    self.said.append((None, message))

  def has_mail(self):
    return bool(self.heard)

  def receive(self):
    heard, self.heard = self.heard, []
    return heard


@pytest.fixture(name="link")
def _link():
  return _Link()


@pytest.fixture(name="engine")
def _engine(link, tmp_path):
  config = engine_config(**(SMALL_ENGINE | {"num_instances": 2}))
  model = load_hf(
    write_shallow_checkpoint(tmp_path), make_mesh(2, 1), dtype="float32"
  )
  group = types.SimpleNamespace(
    link=link,
    transport=InProcessTransport(),
    process_of={0: 0, 1: 1}.__getitem__,
    options=types.SimpleNamespace(num_processes=2),
  )
  engine = GroupEngine(model, config, group)
  # Instance 1 is another process's.
  engine._own.instances = range(1)
  return engine


def _add(engine: GroupEngine, link: _Link, name: str = "r") -> int:
  """Asks for a request of the member; the number that it got."""
  engine.add_request(
    _PROMPT, SamplingParams(max_tokens=3), request_id=name, instance=1
  )
  process, submit = link.said[-1]
  assert process == 1
  assert isinstance(submit, Submit)
  return submit.uid


def _news(uid: int, *tokens: int, reason: str | None = None):
  news = OutputNews(
    uid=uid,
    token_ids=tokens,
    pieces=(),
    logprobs=(),
    finish_reason=reason,
    error=None,
  )
  return 1, Outputs(news=(news,))


def test_a_name_can_be_used_again_at_once(engine, link):
  first = _add(engine, link)
  with pytest.raises(RequestError, match="request_id must be unique"):
    _add(engine, link)
  engine.abort("r")
  assert link.said[-1] == (1, Abort(request_id="r"))
  second = _add(engine, link)
  assert second != first

  # The member said so before it heard of the second one.
  link.heard = [_news(first, 8), _news(first, reason="abort")]
  (ended,) = engine.step()
  assert (ended.uid, ended.finish_reason) == (first, "abort")
  assert ended.token_ids == ()
  assert engine.is_unfinished("r")
  assert engine.progress("r") == (0, 3)

  link.heard = [_news(second, 9), _news(second, 10, reason="stop")]
  outputs = engine.step()
  assert [out.uid for out in outputs] == [second] * 2
  assert outputs[-1].token_ids == (9, 10)
  assert not engine.is_unfinished("r")
  assert not engine.has_unfinished()


def test_tokens_told_by_columns_are_of_their_requests(engine, link):
  uid = _add(engine, link)
  columns = Outputs(uids=(uid + 1, uid), token_ids=(3, 8), texts=("", "x"))
  link.heard = [(1, columns)]
  (output,) = engine.step()  # The other one ended here meanwhile.
  assert (output.uid, output.new_token_ids, output.new_text) == (uid, (8,), "x")
  assert engine.progress("r") == (3, 3)  # The report of that is yet to come.


def _stalled(engine: GroupEngine, *running: int):
  """What a member says whose requests wait for each other."""
  use = dataclasses.replace(
    engine._own.use(), running=running, stalled_rounds=3
  )
  return 1, use


def _hear(engine: GroupEngine, link: _Link, *messages) -> list:
  """What process 0 says when it has heard something, and looks for a stall."""
  link.heard = list(messages)
  link.said.clear()
  engine.step()
  engine._looked_s = 0.0
  engine.step()
  return link.said


def test_who_gave_way_comes_back_when_another_has_ended(engine, link):
  old, young = _add(engine, link, "old"), _add(engine, link, "young")
  said = _hear(engine, link, _stalled(engine, old, young))
  assert said == [(1, GiveUp(uid=young, is_alone=False))]
  assert _hear(engine, link, _news(old, 8)) == []
  said = _hear(engine, link, _news(old, 9, reason="stop"))
  assert said == [(None, ComeBack(uid=young))]


def test_an_abort_lets_others_come_back_too(engine, link):
  old, young = _add(engine, link, "old"), _add(engine, link, "young")
  _hear(engine, link, _stalled(engine, old, young))
  engine.abort("old")
  assert link.said[-1] == (None, ComeBack(uid=young))


def test_nobody_gives_way_to_one_that_has_ended(engine, link):
  """Reports come late; for its end one would wait for ever."""
  old, young = _add(engine, link, "old"), _add(engine, link, "young")
  report = _stalled(engine, old, young)
  assert _hear(engine, link, report, _news(old, 9, reason="stop")) == []


def test_it_knows_how_the_host_memory_of_members_is_used(engine, link):
  own, other = engine._own.use().instances
  held = PoolCounts(used=3, free=4, hosted=0, reserved=1, total=8)
  report = dataclasses.replace(
    engine._own.use(),
    instances=(dataclasses.replace(other, host_counts=held),),
  )
  engine._own.use = lambda: dataclasses.replace(report, instances=(own,))
  _hear(engine, link, (1, report))
  assert [each.host_counts.used for each in engine.use().instances] == [0, 3]


class _EmptyTurns:
  """Others take turns all the time, in which this process only answers."""

  is_shared = True
  is_called = False
  patience_s = 60.0
  next_number = 1

  def ask(self, work):
    pass

  def ready(self):
    pass

  def next(self):
    work = GroupWork(decode=True)
    return StepHeader(number=self.next_number, work=work, is_shared=True)

  def take(self, turn):
    self.next_number += 1

  def has_call(self):
    return False


class _NoTurns(_EmptyTurns):
  """Nobody wants one.

  Attributes:
    asked: What this process had for the next turn, each time.
  """

  def __init__(self):
    self.asked = []

  def ask(self, work):
    self.asked.append(work)

  def next(self):
    return None


class _Called(_NoTurns):
  """Somebody wants one, for which others are not ready.

  Attributes:
    num_ready: How often this process said that it is.
  """

  is_called = True

  def __init__(self):
    super().__init__()
    self.num_ready = 0

  def ready(self):
    self.num_ready += 1


def _alone(folder, order, transport=None, is_ready=None, **sizes) -> Engine:
  """An engine of two instances that thinks that there are other processes."""
  config = engine_config(**(SMALL_ENGINE | {"num_instances": 2} | sizes))
  model = load_hf(
    write_shallow_checkpoint(folder), make_mesh(2, 1), dtype="float32"
  )
  return Engine(
    model,
    config,
    order=order,
    transport=transport,
    is_ready=is_ready or is_computed,
  )


def test_a_manager_that_says_something_ends_a_wait(tmp_path):
  looks = []

  class Transport(InProcessTransport):
    def has_mail(self):
      looks.append(None)
      return len(looks) == 3

  engine = _alone(
    tmp_path, _NoTurns(), transport=Transport(), is_ready=lambda _: False
  )
  engine.add_request(_PROMPT, SamplingParams(max_tokens=1), request_id="r")
  assert engine.step() == []
  assert len(looks) == 3
  assert engine._in_flight


def test_managers_report_while_devices_compute(tmp_path, monkeypatch):
  engine = _alone(tmp_path, _NoTurns())
  engine.add_request(_PROMPT, SamplingParams(max_tokens=3), request_id="r")
  (manager, _), are_busy = engine.group.managers, []
  tick = manager.tick

  def spy():
    are_busy.append(bool(engine._in_flight))
    tick()

  monkeypatch.setattr(manager, "tick", spy)
  while engine.has_unfinished():
    engine.step()
  assert are_busy == [True] * 3
  engine.settle()  # Without a step, leases must be renewed all the same.
  assert are_busy == [True] * 3 + [False]


def test_while_all_is_at_home_nobody_looks_for_group_work(
  tmp_path, monkeypatch
):
  order = _NoTurns()
  engine = _alone(tmp_path, order)
  monkeypatch.setattr(
    Batcher, "group_work", lambda *_: pytest.fail("Nothing was spilled.")
  )
  engine.add_request(_PROMPT, SamplingParams(max_tokens=3), request_id="r")
  while engine.has_unfinished():
    outputs = engine.step()
  assert len(outputs[-1].token_ids) == 3
  assert len(order.asked) >= 3
  assert not any(order.asked)


def test_answers_to_others_are_no_progress_of_ones_own(tmp_path, monkeypatch):
  now_s = 0.0
  config = engine_config(**(SMALL_ENGINE | {"num_instances": 2}))
  model = load_hf(
    write_shallow_checkpoint(tmp_path), make_mesh(2, 1), dtype="float32"
  )
  engine = Engine(model, config, clock=lambda: now_s, order=_EmptyTurns())
  # Its request never gets room.
  monkeypatch.setattr(Batcher, "plan", lambda *_: StepPlan())
  engine.add_request(_PROMPT, SamplingParams(max_tokens=1), request_id="r")
  for _ in range(6):
    now_s += max(config.lending.resend_after_s, REPORT_EVERY_S)
    engine.step()
  assert engine.runner.launches["group_decode"] > 0
  assert engine.use().stalled_rounds >= 4


def test_decode_steps_follow_each_other_while_others_are_waited_for(tmp_path):
  order = _Called()
  order.is_called = False
  engine = _alone(tmp_path, order)
  launches = engine.runner.launches
  engine.add_request(_PROMPT, SamplingParams(max_tokens=9), instance=0)
  engine.step()  # The prompt is over, and a decode step under way.
  order.is_called = True
  engine.add_request(_PROMPT, SamplingParams(max_tokens=9), instance=0)
  engine._in_flight._is_ready = lambda _: False
  order.has_call = lambda: True  # Nothing is waited for.
  engine.step()
  assert order.num_ready == 1  # Also with both under way.
  assert dict(launches) == {"local_prefill": 1, "local_decode": 2}


def test_nothing_follows_a_prompt_for_which_others_wait(tmp_path):
  order = _Called()
  order.is_called = False
  engine = _alone(tmp_path, order, is_ready=lambda _: False)
  order.has_call = lambda: True  # Nothing is waited for.
  launches = engine.runner.launches
  engine.add_request(_PROMPT, SamplingParams(max_tokens=9), instance=0)
  ahead, engine._planner._is_async = engine._planner._is_async, False
  engine.step()
  engine._planner._is_async = ahead
  order.is_called = True
  engine.step()
  assert order.num_ready == 0
  assert dict(launches) == {"local_prefill": 1}


def test_no_prompt_is_begun_before_a_turn_that_is_called(tmp_path):
  order = _Called()
  engine = _alone(tmp_path, order)
  launches = engine.runner.launches
  engine.add_request(_PROMPT, SamplingParams(max_tokens=4), request_id="r")
  assert engine.step() == []
  assert not engine._in_flight
  assert order.num_ready == 1

  order.is_called = False
  (output,) = engine.step()
  assert output.new_token_ids
  # And what follows it: nobody wants a turn any more.
  assert dict(launches) == {"local_prefill": 1, "local_decode": 1}

  order.is_called = True  # Decode steps go on.
  engine.add_request(_PROMPT, SamplingParams(max_tokens=1), request_id="s")
  for _ in range(3):
    (output,) = engine.step()
    assert output.request_id == "r"
  assert dict(launches) == {"local_prefill": 1, "local_decode": 3}


def test_a_process_with_a_prompt_under_way_is_not_ready(tmp_path):
  order, is_over = _Called(), False
  engine = _alone(tmp_path, order, is_ready=lambda _: is_over)
  order.has_call = lambda: True  # Nothing is waited for.
  engine.add_request(_PROMPT, SamplingParams(max_tokens=2), request_id="r")
  order.is_called = False
  engine.step()
  order.is_called = True
  before = order.num_ready
  engine.step()
  assert order.num_ready == before
  is_over = True
  engine.step()
  is_over = False
  engine.step()  # A decode step is under way.
  assert engine._in_flight
  engine.step()
  assert order.num_ready > before


def test_rows_at_home_take_part_in_a_decode_step_of_the_group(tmp_path):
  def tokens(order):
    engine = _alone(tmp_path, order)
    engine.add_request(_PROMPT, SamplingParams(max_tokens=9), instance=0)
    engine.add_request(_PROMPT[:2], SamplingParams(max_tokens=9), instance=0)
    engine.add_request(_PROMPT[1:], SamplingParams(max_tokens=9), instance=1)
    ended = {}
    while engine.has_unfinished():
      for output in engine.step():
        ended[output.request_id] = output.token_ids
    return ended, engine.runner.launches

  alone, _ = tokens(_NoTurns())
  together, launches = tokens(_EmptyTurns())
  assert together == alone
  assert launches["local_decode"] == 0
  assert launches["group_decode"] >= 9


def test_a_prompt_behind_the_groups_step_ends_by_itself(tmp_path):
  way = {"temperature": 0.8, "repetition_penalty": 1.4, "seed": 5}

  def serve(order):
    engine = _alone(tmp_path, order, async_scheduling=False)

    def add(name, prompt):
      sampling = SamplingParams(max_tokens=12, **way)
      engine.add_request(prompt, sampling, request_id=name, instance=0)

    add("first", _PROMPT)
    add("doomed", _PROMPT)
    for _ in range(3):
      engine.step()
    add("late", _PROMPT[:2])
    engine._in_flight._is_ready = lambda _: False
    engine._order.has_call = lambda: True  # Nothing is waited for.
    engine.step()
    num_flights = len(engine._in_flight._flights)
    engine.abort("doomed")  # In the middle of it.
    engine._in_flight._is_ready = is_computed
    outputs = {}
    while engine.has_unfinished():
      outputs |= {output.request_id: output for output in engine.step()}
    return num_flights, {
      name: outputs[name].token_ids for name in ("first", "late")
    }

  num_alone, alone = serve(_NoTurns())
  num_together, together = serve(_EmptyTurns())
  assert (num_alone, num_together) == (1, 2)
  assert together == alone


def test_a_turn_waits_for_a_step_under_way(tmp_path):
  order, is_over = _NoTurns(), False
  engine = _alone(tmp_path, order, is_ready=lambda _: is_over)
  order.has_call = lambda: True  # Nothing is waited for.
  engine.add_request(_PROMPT, SamplingParams(max_tokens=3), instance=0)
  engine.step()
  header = StepHeader(number=1, work=GroupWork(decode=True), is_shared=True)
  order.next = lambda: header
  engine.add_request(_PROMPT, SamplingParams(max_tokens=3), instance=1)
  engine.step()
  local = {"local_prefill": 1, "local_decode": 1}  # One behind the other.
  assert dict(engine.runner.launches) == local
  is_over = True
  engine.step()
  assert dict(engine.runner.launches) == local
  engine.step()
  engine.step()
  assert dict(engine.runner.launches) == {
    "local_prefill": 2,
    "local_decode": 1,
    "group_decode": 1,
  }


def test_the_next_turn_is_asked_for_before_this_one_is_waited_for(tmp_path):
  asked, order = [], _EmptyTurns()
  order.ask = lambda work: asked.append(order.next_number)
  engine = _alone(tmp_path, order, is_ready=lambda _: False)
  order.has_call = lambda: True  # Nothing is waited for.
  engine.step()
  assert engine._in_flight.has_group
  assert asked == [1, 2]


def test_prompts_in_a_turn_go_in_short_chunks(tmp_path):
  # Others may wait for them with the next turn.
  sizes = {"prefill_buckets": (16, 64), "group_prefill_buckets": (16,)}
  prompt = [5] * 60
  for order, num_tokens in ((_NoTurns(), 60), (_EmptyTurns(), 16)):
    engine = _alone(tmp_path, order, is_ready=lambda _: False, **sizes)
    order.has_call = lambda: True  # Nothing is waited for.
    engine.add_request(prompt, SamplingParams(max_tokens=1), instance=0)
    engine.step()
    (row,) = engine._in_flight.rows(0).values()
    assert row.num_tokens == num_tokens


def test_a_request_with_a_row_under_way_gives_nothing_up(tmp_path):
  engine = _alone(tmp_path, _NoTurns())
  engine.add_request(
    _PROMPT, SamplingParams(max_tokens=2), request_id="r", instance=0, uid=7
  )
  engine._in_flight._is_ready = lambda _: False
  engine._order.has_call = lambda: True  # Nothing is waited for.
  engine.step()
  assert engine._in_flight.has_rows
  for is_alone in (False, True):
    engine.give_up(7, is_alone=is_alone)
  engine._in_flight._is_ready = lambda _: True
  (output,) = engine.step()
  assert output.new_token_ids


def test_what_came_while_nobody_called_is_not_kept_waiting(engine, link):
  uid = _add(engine, link)
  # A step of its own is under way, and never over.
  engine._own._in_flight._is_ready = lambda _: False
  engine.add_request(_PROMPT, SamplingParams(max_tokens=1), instance=0)
  link.heard = [_news(uid, 4)]
  assert [out.new_token_ids for out in engine.step()] == [(4,)]
