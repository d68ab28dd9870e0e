"""Instances do not wait for each other, and no step commits what is stale."""

import random

import jax
import numpy as np
import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import step_committer
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.in_flight import Flight, InFlight, LaunchedStep
from infinite_llm.engine.programs import StepKind
from infinite_llm.engine.sampler import PendingSample
from infinite_llm.engine.sampling import Sampled
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from tests.testing import (
  SamplingOracle,
  drain,
  lockstep,
  pools_are_empty,
  write_shallow_checkpoint,
)

MAX_TOKENS = 256
PENALTY = {"repetition_penalty": 1.7}


class Gate:
  """Readiness that tests decide.

  Attributes:
    held: Devices whose steps are said not to be over.
    is_check_held: Whether a check, which asks all devices, is said not to be.
    chance: Probability with which any other array is said to be ready.
  """

  def __init__(self):
    self.rng = random.Random(0)
    self.open()

  def open(self) -> None:
    self.held: set[jax.Device] = set()
    self.is_check_held = False
    self.chance = 1.0

  def __call__(self, array: jax.Array) -> bool:
    is_check = array.dtype == bool
    is_held = self.is_check_held if is_check else self.held & array.devices()
    if is_held or self.rng.random() >= self.chance:
      return False
    return lockstep(array)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("in_flight"))


@pytest.fixture(scope="module", name="oracle")
def _oracle(checkpoint):
  model = load_hf(checkpoint, make_mesh(1, 1), dtype="float32")
  return SamplingOracle(model.dense(), MAX_TOKENS)


@pytest.fixture(scope="module", name="gate")
def _gate():
  return Gate()


@pytest.fixture(scope="module", name="shared")
def _shared(checkpoint, gate):
  model = load_hf(checkpoint, make_mesh(3, 1), dtype="float32")
  return Engine(
    model,
    engine_config(
      num_instances=3,
      block_size=16,
      num_blocks=10,
      max_num_seqs=4,
      decode_buckets=(4,),
      prefill_buckets=(64,),
      headroom_blocks=0,
      group_prefill_buckets=(64,),
      spill_slots=2,
      resend_after_s=0.01,
      heartbeat_every_s=0.005,
    ),
    is_ready=gate,
  )


@pytest.fixture(name="engine")
def _engine(shared, gate):
  """Three instances of 9 rBlocks, 144 tokens, each."""
  yield shared
  gate.open()
  assert drain(shared) == {}
  assert pools_are_empty(shared)


def device_of(engine: Engine, instance: int) -> jax.Device:
  return engine.runner.row_meshes[instance].devices.item()


def has_spilled(engine: Engine, instance: int) -> bool:
  """Whether any running request has rBlocks elsewhere."""
  spill = engine.group.managers[instance].spill
  running = engine.batchers[instance].running
  return any(spill(request.uid) is not None for request in running)


def add(engine: Engine, length: int, count: int, instance: int, **way) -> str:
  prompt = np.random.default_rng(length).integers(3, 256, length).tolist()
  sampling = SamplingParams(max_tokens=count, ignore_eos=True, **way)
  return engine.add_request(prompt, sampling, instance=instance)


def check(oracle, output, count: int, **way) -> None:
  assert output.error is None
  assert len(output.token_ids) == count
  expected = oracle.tokens(
    list(output.prompt_token_ids), output.token_ids, SamplingParams(**way)
  )
  assert list(output.token_ids) == expected


def flight(
  *instances: int, is_group: bool = False, is_prefill: bool = False
) -> Flight:
  def step(instance):
    sampled = Sampled(*[np.int32(instance)] * len(Sampled._fields))
    pending = PendingSample(sampled, np.bool(True))
    return LaunchedStep(
      instance=instance,
      rows=(),
      pending=pending,
      kind=StepKind(is_group=is_group, is_prefill=is_prefill),
      launched_s=0.0,
    )

  return Flight(steps=tuple(map(step, instances)), is_group=is_group)


def test_without_spills_nobody_looks_for_group_work(
  engine, oracle, monkeypatch
):
  def refuse(*_):
    raise AssertionError("Nothing was spilled.")

  monkeypatch.setattr(Batcher, "group_work", refuse)
  before = dict(engine.runner.launches)
  names = [add(engine, 20 + i, 6, i) for i in range(3)]
  finished = drain(engine)
  for name in names:
    check(oracle, finished[name], 6)
  after = dict(engine.runner.launches)
  launched = {name for name in after if after[name] != before.get(name, 0)}
  assert launched == {"local_decode", "local_prefill"}


class TestInFlight:
  def test_a_flight_that_is_alone_is_not_looked_at(self):
    in_flight = InFlight(lambda _: pytest.fail("looked"))
    assert in_flight.wait() == []
    only = flight(0)
    in_flight.add([only])
    assert in_flight.wait() == [only]
    assert in_flight.holds(0)
    assert not in_flight.holds(1)

  def test_a_look_does_not_wait(self):
    over = set()
    in_flight = InFlight(lambda array: int(array) in over)
    only = flight(0)
    in_flight.add([only])
    assert in_flight.wait(at_once=True) == []
    over.add(0)
    assert in_flight.wait(at_once=True) == [only]

  def test_those_that_are_over_come_in_the_order_of_launching(self):
    over = {1, 2}
    in_flight = InFlight(lambda array: int(array) in over)
    flights = [flight(2), flight(0), flight(1)]
    in_flight.add(flights)
    assert in_flight.wait() == [flights[0], flights[2]]
    for each in in_flight.wait():
      in_flight.remove(each)
    assert [in_flight.holds(n) for n in range(3)] == [True, False, False]

  def test_of_one_instance_the_first_that_was_launched_is_the_first(self):
    in_flight = InFlight(lambda _: True)
    flights = [flight(0, 1, is_group=True), flight(2), flight(1), flight(2)]
    in_flight.add(flights)
    assert in_flight.wait() == flights[:2]
    in_flight.remove(flights[0])
    assert in_flight.wait() == flights[1:3]
    in_flight.remove(flights[1])
    assert in_flight.wait() == flights[2:]

  @pytest.mark.parametrize("is_group", [False, True])
  def test_long_is_what_no_group_program_is_in(self, is_group):
    in_flight = InFlight(lambda _: False)
    in_flight.add([flight(0), flight(1, is_group=True)])
    assert not in_flight.has_long
    in_flight.add([flight(2, is_group=is_group, is_prefill=True)])
    assert in_flight.has_long is not is_group

  def test_a_group_flight_is_over_when_all_of_it_is(self):
    over = {1, 2}
    in_flight = InFlight(lambda array: int(array) in over)
    joint, single = flight(0, 1, is_group=True), flight(2)
    in_flight.add([joint, single])
    assert in_flight.has_group
    assert in_flight.wait() == [single]
    over.add(0)
    assert in_flight.wait() == [joint, single]


class TestMeanwhile:
  def test_it_is_called_while_devices_compute(self, engine, gate):
    add(engine, 20, 1, 0)
    gate.held = {device_of(engine, 0)}
    seen = []

    def look() -> bool:
      seen.append(engine.runner.launches["local_prefill"])
      return True  # In a hurry: no step is waited for.

    before = engine.runner.launches["local_prefill"]
    assert engine.step(look) == []
    assert seen == [before + 1]
    assert engine.use().stalled_rounds == 0
    gate.open()
    assert [len(out.new_token_ids) for out in engine.step(look)] == [1]

  def test_who_is_not_in_a_hurry_gets_what_is_computed(self, engine):
    add(engine, 20, 1, 0)
    assert [out.is_finished for out in engine.step(lambda: False)] == [True]


class TestIndependence:
  def test_one_instance_gets_many_tokens_in_one_step_of_another(
    self, engine, gate, oracle
  ):
    gate.held = {device_of(engine, 0)}
    slow = add(engine, 60, 3, instance=0)
    quick = add(engine, 20, 7, instance=1)
    outputs = [output for _ in range(7) for output in engine.step()]
    assert [output.request_id for output in outputs] == [quick] * 7
    assert outputs[-1].is_finished
    assert engine.progress(slow) == (0, 60)
    check(oracle, outputs[-1], 7)
    check(oracle, drain(engine)[slow], 3)

  def test_requests_join_while_another_instance_is_busy(
    self, engine, gate, oracle
  ):
    gate.held = {device_of(engine, 0)}
    slow = add(engine, 60, 2, instance=0)
    names = [add(engine, 30, 12, instance=1)]
    engine.step()
    names.append(add(engine, 40, 5, instance=2))
    finished = drain(engine)
    for name, count in zip((slow, *names), (2, 12, 5), strict=True):
      check(oracle, finished[name], count)

  def test_a_group_program_runs_while_a_lender_has_a_step_under_way(
    self, engine, gate, oracle
  ):
    gate.held = {device_of(engine, 2)}
    long = add(engine, 200, 6, instance=0)
    beside = add(engine, 50, 8, instance=2)
    finished = drain(engine)
    check(oracle, finished[long], 6)
    check(oracle, finished[beside], 8)

  @pytest.mark.parametrize(
    "way", [{}, PENALTY, {"temperature": 1.2, "seed": 3}]
  )
  def test_tokens_do_not_depend_on_which_step_is_first(
    self, engine, gate, oracle, way
  ):
    gate.chance = 0.3
    asked = ((190, 9, 0), (30, 14, 0), (165, 8, 1), (22, 20, 2), (40, 9, 1))
    names = [add(engine, *each, **way) for each in asked]
    finished = drain(engine)
    for name, (_, count, _) in zip(names, asked, strict=True):
      check(oracle, finished[name], count, **way)

  def test_rblocks_that_moved_wait_for_their_check_and_no_step_does(
    self, engine, gate, oracle
  ):
    gate.is_check_held = True
    long = add(engine, 200, 6, instance=0)
    while not engine.group.is_checking:
      engine.step()
    computed, _ = engine.progress(long)
    beside = add(engine, 20, 9, instance=2)  # Lends nothing.
    while engine.is_unfinished(beside):
      outputs = engine.step()
    check(oracle, outputs[-1], 9)
    assert engine.group.is_checking
    assert engine.progress(long) == (computed, 200)
    gate.open()
    check(oracle, drain(engine)[long], 6)

  def test_instances_that_borrow_share_their_group_programs(
    self, engine, gate, oracle
  ):
    # 10 rBlocks each where 9 are.
    first = add(engine, 150, 9, instance=0)
    second = add(engine, 151, 8, instance=1)
    third = add(engine, 20, 44, instance=2)
    while not (has_spilled(engine, 0) and has_spilled(engine, 1)):
      engine.step()
    launches = engine.runner.launches
    before = launches.copy()
    finished = {}
    while {first, second} - finished.keys():
      for output in engine.step():
        if output.is_finished:
          finished[output.request_id] = output
    since = launches - before
    assert since["group_decode"] <= 11  # For 9 and 8 tokens.
    assert since["local_decode"] <= 2  # The third takes part in them.
    finished |= drain(engine)
    check(oracle, finished[third], 44)
    check(oracle, finished[first], 9)
    check(oracle, finished[second], 8)


class TestAbort:
  def test_a_row_of_an_aborted_request_is_not_committed(
    self, engine, gate, oracle
  ):
    gate.held = {device_of(engine, 0)}
    doomed = add(engine, 60, 5, instance=0, **PENALTY)
    add(engine, 20, 3, instance=1)
    engine.step()
    engine.abort(doomed)
    # It takes the rBlocks and the sampler's state of the other.
    heir = add(engine, 61, 5, instance=0, **PENALTY)
    outputs = engine.step()
    assert [o.token_ids for o in outputs if o.request_id == doomed] == [()]
    finished = drain(engine)
    check(oracle, finished[heir], 5, **PENALTY)

  def test_the_last_request_can_be_aborted_in_flight(
    self, engine, gate, oracle
  ):
    gate.held = {device_of(engine, 0)}
    doomed = add(engine, 60, 5, instance=0)
    quick = add(engine, 20, 1, instance=1)
    assert [o.request_id for o in engine.step()] == [quick]
    engine.abort(doomed)
    assert [o.finish_reason for o in engine.step()] == ["abort"]
    assert not engine.has_unfinished()
    after = add(engine, 30, 2, instance=0)
    check(oracle, drain(engine)[after], 2)


class Interrupts:
  """Raises `KeyboardInterrupt` before or after every fourth call."""

  def __init__(self, call, *, is_before: bool):
    self.call = call
    self.is_before = is_before
    self.num_calls = 0
    self.num_raised = 0

  def __call__(self, *args, **options):
    self.num_calls += 1
    is_due = self.num_calls % 4 == 0
    if is_due and self.is_before:
      self.num_raised += 1
      raise KeyboardInterrupt
    result = self.call(*args, **options)
    if is_due:
      self.num_raised += 1
      raise KeyboardInterrupt
    return result


class TestInterrupts:
  """After an exception from anywhere in a step, steps go on rightly."""

  def drain(self, engine, interrupts) -> dict:
    finished = {}
    while engine.has_unfinished():
      try:
        outputs = engine.step()
      except KeyboardInterrupt:
        continue
      finished |= {o.request_id: o for o in outputs if o.is_finished}
    assert interrupts.num_raised >= 2
    return finished

  @pytest.mark.parametrize("is_before", [True, False])
  @pytest.mark.parametrize(
    "where", ["local_step", "group_step", "fetch", "plans_behind", "remove"]
  )
  @pytest.mark.parametrize("way", [{}, PENALTY])
  def test_no_token_is_lost_or_wrong(
    self, engine, oracle, monkeypatch, where, is_before, way
  ):
    owner = {
      "fetch": step_committer,
      "plans_behind": engine._planner,
      "remove": engine._in_flight,
    }.get(where, engine.runner)
    call = getattr(owner, where)
    interrupts = Interrupts(call, is_before=is_before)
    monkeypatch.setattr(owner, where, interrupts)
    asked = ((180, 9, 0), (30, 10, 0), (35, 12, 1))
    if where == "remove":  # Each time prompts are computed anew, in one step.
      asked = asked[1:]
    names = [add(engine, *each, **way) for each in asked]
    finished = self.drain(engine, interrupts)
    for name, (_, count, _) in zip(names, asked, strict=True):
      check(oracle, finished[name], count, **way)

  @pytest.mark.parametrize("is_before", [True, False])
  def test_a_row_that_is_committed_by_half_is_computed_anew(
    self, engine, oracle, monkeypatch, is_before
  ):
    batcher = engine.batchers[0]
    interrupts = Interrupts(batcher.advance, is_before=is_before)
    monkeypatch.setattr(batcher, "advance", interrupts)
    names = [add(engine, n, 6, instance=0, **PENALTY) for n in (30, 45)]
    finished = self.drain(engine, interrupts)
    for name in names:
      check(oracle, finished[name], 6, **PENALTY)
