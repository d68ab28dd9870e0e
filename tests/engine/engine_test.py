"""The engine: batching, preemption, dispatch, and requests that go wrong.

Engines are shared by the tests of this module, since compiling is what costs;
each test leaves its engine empty.
"""

import functools
import itertools

import numpy as np
import pytest
import safetensors.numpy

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import warm_up
from infinite_llm.engine.engine import Engine
from infinite_llm.errors import CapacityError, ModelError, RequestError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.testing import (
  SMALL_ENGINE,
  SamplingOracle,
  drain,
  pools_are_empty,
  write_shallow_checkpoint,
)

BLOCK_SIZE = 16
MAX_TOKENS = 256


def load(path, num_instances):
  return load_hf(path, make_mesh(num_instances, 1), dtype="float32")


def build(model, **options) -> Engine:
  options = (
    SMALL_ENGINE
    | {
      "block_size": BLOCK_SIZE,
      "prefill_buckets": (64,),
      "group_prefill_buckets": (64,),
    }
    | options
  )
  return Engine(model, engine_config(**options))


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module", name="oracle")
def _oracle(checkpoint):
  return SamplingOracle(load(checkpoint, 1).dense(), MAX_TOKENS)


def emptied(engine: Engine):
  yield engine
  assert drain(engine) == {}
  assert pools_are_empty(engine)


@pytest.fixture(scope="module", name="lending_engine")
def _lending_engine(checkpoint):
  return build(load(checkpoint, 2), num_instances=2, num_blocks=10)


@pytest.fixture(name="engine")
def _engine(lending_engine):
  """Two instances of 9 rBlocks each, 288 tokens in all."""
  yield from emptied(lending_engine)


@pytest.fixture(scope="module", name="lonely_engine")
def _lonely_engine(checkpoint):
  return build(
    load(checkpoint, 1), num_blocks=9, policy="static", prefill_buckets=(16,)
  )


@pytest.fixture(name="tiny")
def _tiny(lonely_engine):
  """One instance of 8 rBlocks that lends and borrows nothing: 128 tokens."""
  yield from emptied(lonely_engine)


def prompt_of(length: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(3, 256, length).tolist()


def sampling_of(count: int, **options) -> SamplingParams:
  return SamplingParams(max_tokens=count, ignore_eos=True, **options)


# Every way of choosing tokens whose result must not depend on circumstances.
WAYS = (
  {},
  {"temperature": 1.3, "seed": 11},
  {"repetition_penalty": 1.7},
  {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5},
  {"temperature": 2.0, "top_k": 20, "min_p": 0.01, "seed": 2**32 - 1},
)


def check(oracle, output, sampling):
  """An answer is the oracle's, and has the length that was asked for."""
  assert output.error is None
  assert len(output.token_ids) == sampling.max_tokens
  prompt = list(output.prompt_token_ids)
  expected = oracle.tokens(prompt, output.token_ids, sampling)
  assert list(output.token_ids) == expected


def steps(engine, count: int) -> list:
  return [output for _ in range(count) for output in engine.step()]


class TestBatching:
  def test_more_requests_than_run_at_once_all_get_their_turn(
    self, engine, oracle
  ):
    asked = {}
    for n in range(14):
      sampling = sampling_of(3 + n % 5, **WAYS[n % 5])
      name = engine.add_request(prompt_of(1 + 7 * n, seed=n), sampling)
      asked[name] = sampling
    running = 0
    finished = {}
    while engine.has_unfinished():
      for output in engine.step():
        if output.is_finished:
          finished[output.request_id] = output
      sizes = [len(batcher.running) for batcher in engine.batchers]
      running = max(running, *sizes)
    assert running == 4
    assert finished.keys() == asked.keys()
    for name, sampling in asked.items():
      check(oracle, finished[name], sampling)

  def test_requests_join_while_others_run(self, engine, oracle):
    asked = {}
    finished = {}
    for n in range(7):
      sampling = sampling_of(10, **WAYS[n % 5])
      name = engine.add_request(prompt_of(20 + n, seed=n), sampling)
      asked[name] = sampling
      for output in steps(engine, 2):
        if output.is_finished:
          finished[output.request_id] = output
    finished |= drain(engine)
    for name, sampling in asked.items():
      check(oracle, finished[name], sampling)

  @pytest.mark.parametrize("way", WAYS)
  def test_an_answer_does_not_depend_on_the_batch(self, engine, way):
    sampling = sampling_of(9, **way)
    answers = set()
    for num_others, instance in itertools.product((0, 1, 5), (0, 1)):
      name = engine.add_request(prompt_of(50), sampling, instance=instance)
      for n in range(num_others):
        other = sampling_of(12, temperature=1.0)
        engine.add_request(prompt_of(9 * n + 1, n), other, instance=instance)
      answers.add(drain(engine)[name].token_ids)
    assert len(answers) == 1

  @pytest.mark.parametrize("way", WAYS)
  def test_chunks_give_what_a_whole_prompt_gives(
    self, engine, tiny, oracle, way
  ):
    sampling = sampling_of(6, **way)
    before = tiny.runner.launches["local_prefill"]
    outputs = []
    for each in (engine, tiny):
      name = each.add_request(prompt_of(61), sampling)
      outputs.append(drain(each)[name])
    # 61 tokens in chunks of 16, and in one of 64; the dense model is whole too.
    assert tiny.runner.launches["local_prefill"] == before + 4
    assert outputs[0].token_ids == outputs[1].token_ids
    check(oracle, outputs[0], sampling)

  def test_outputs_come_as_tokens_do(self, engine):
    name = engine.add_request(prompt_of(70), sampling_of(4))
    seen = []
    while engine.has_unfinished():
      seen += engine.step()
    assert [o.request_id for o in seen] == [name] * 4
    assert [len(o.token_ids) for o in seen] == [1, 2, 3, 4]
    assert [o.finish_reason for o in seen] == [None, None, None, "length"]

  def test_progress_of_a_prompt_is_told(self, tiny):
    name = tiny.add_request(prompt_of(40), sampling_of(2))
    assert tiny.progress(name) == (0, 40)
    told = []
    while tiny.has_unfinished():
      tiny.step()
      told.append(tiny.progress(name))
    assert told[:3] == [(16, 40), (32, 40), (40, 40)]
    assert told[-1] == (1, 1)

  def test_a_prefill_program_as_small_as_its_rows_is_right(
    self, checkpoint, oracle
  ):
    engine = build(load(checkpoint, 1), num_blocks=9, prefill_buckets=(4,))
    asked = {
      engine.add_request(prompt_of(n, seed=n), sampling_of(2)): sampling_of(2)
      for n in (3, 7, 18)
    }
    finished = drain(engine)
    for name, sampling in asked.items():
      check(oracle, finished[name], sampling)


class TestIdleCallers:
  """An engine that nobody steps for a while is not one that is stuck."""

  @pytest.fixture(autouse=True)
  def _time_flies(self, engine, monkeypatch):
    """Between any two looks at the engine's clock a minute passes."""
    minutes = itertools.count()
    monkeypatch.setattr(engine.stall, "_clock", lambda: 60.0 * next(minutes))
    monkeypatch.setattr(engine.stall, "_last_step_s", 0.0)

  def test_a_request_may_need_all_memory_after_another_did(
    self, engine, oracle
  ):
    for n in range(3):
      name = engine.add_request(prompt_of(230, n), sampling_of(8), instance=0)
      # What the one before has borrowed was not yet given back.
      check(oracle, drain(engine)[name], sampling_of(8))

  def test_requests_wait_for_messages_between_steps(self, engine, oracle):
    names = [
      engine.add_request(prompt_of(140, n), sampling_of(8), instance=0)
      for n in range(2)
    ]
    finished = drain(engine)
    for name in names:
      check(oracle, finished[name], sampling_of(8))


class TestPreemption:
  def preempted(self, engine, monkeypatch) -> list:
    """Gives the uids that an engine of one instance preempts from now on."""
    uids = []
    preempt = engine.batchers[0].preempt

    def noted(uid):
      uids.append(uid)
      preempt(uid)

    monkeypatch.setattr(engine.batchers[0], "preempt", noted)
    return uids

  @pytest.mark.parametrize("way", WAYS)
  def test_a_preempted_request_gives_the_same_tokens(
    self, tiny, oracle, monkeypatch, way
  ):
    # Each fits alone; together they need 12 rBlocks of the 8.
    asked = [(prompt_of(45, seed), sampling_of(40, **way)) for seed in (1, 2)]
    alone = []
    for prompt, sampling in asked:
      name = tiny.add_request(prompt, sampling)
      alone.append(drain(tiny)[name])
    preempted = self.preempted(tiny, monkeypatch)
    names = [tiny.add_request(*each) for each in asked]
    together = drain(tiny)
    assert len(preempted) >= 1
    for name, undisturbed, (_, sampling) in zip(
      names, alone, asked, strict=True
    ):
      assert together[name].token_ids == undisturbed.token_ids
      check(oracle, together[name], sampling)

  @pytest.mark.parametrize("way", WAYS)
  def test_tokens_that_were_not_proved_do_not_count(
    self, tiny, oracle, monkeypatch, way
  ):
    # A tag that is lost refutes a row after its token was chosen: the token is
    # chosen again, under penalties that have not seen it, and with the same
    # random number.
    preempted = self.preempted(tiny, monkeypatch)
    name = tiny.add_request(prompt_of(45), sampling_of(20, **way))
    for _ in range(3):
      steps(tiny, 6)
      pool = tiny.runner.pool.row(0)
      lost = pool._replace(tag=pool.tag.at[1].set(0))
      tiny.runner.pool.set_row(0, lost)
    finished = drain(tiny)
    assert len(preempted) == 3
    check(oracle, finished[name], sampling_of(20, **way))

  def test_the_oldest_is_never_preempted(self, tiny, monkeypatch):
    preempted = self.preempted(tiny, monkeypatch)
    names = [
      tiny.add_request(prompt_of(30, seed=n), sampling_of(60)) for n in range(4)
    ]
    order = []
    while tiny.has_unfinished():
      order += [o.request_id for o in tiny.step() if o.is_finished]
    assert order[0] == names[0]
    assert len(preempted) >= 2

  def test_a_request_can_be_aborted_while_preempted(
    self, tiny, oracle, monkeypatch
  ):
    preempted = self.preempted(tiny, monkeypatch)
    way = {"repetition_penalty": 1.5}
    first = tiny.add_request(prompt_of(45, 1), sampling_of(40, **way))
    second = tiny.add_request(prompt_of(45, 2), sampling_of(40, **way))
    while not preempted:
      tiny.step()
    tiny.abort(second)
    finished = drain(tiny)
    assert finished[second].finish_reason == "abort"
    check(oracle, finished[first], sampling_of(40, **way))


class TestDispatch:
  def instances(self, engine, lengths) -> list[int]:
    names = [engine.add_request(prompt_of(n), sampling_of(2)) for n in lengths]
    finished = drain(engine)
    return [finished[name].instance for name in names]

  def test_the_least_loaded_instance_is_taken(self, engine):
    # Loads after each: (50, 0) (50, 20) (50, 50) (60, 50) (60, 55).
    assert self.instances(engine, [50, 20, 30, 10, 5]) == [0, 1, 1, 0, 1]

  def test_an_instance_without_work_takes_the_next(self, engine):
    assert self.instances(engine, [1]) == [0]
    assert self.instances(engine, [1, 1]) == [0, 1]

  def test_an_instance_can_be_asked_for(self, engine):
    names = [
      engine.add_request(prompt_of(5), sampling_of(2), instance=1)
      for _ in range(3)
    ]
    finished = drain(engine)
    assert [finished[name].instance for name in names] == [1, 1, 1]

  def test_a_request_that_borrows_runs_beside_one_that_does_not(
    self, engine, oracle
  ):
    launches = engine.runner.launches
    before = launches["local_decode"], launches["group_decode"]
    for way in WAYS:
      sampling = sampling_of(8, **way)
      long = engine.add_request(prompt_of(200), sampling, instance=0)
      short = engine.add_request(prompt_of(30, 1), sampling, instance=1)
      finished = drain(engine)
      for name in (long, short):
        check(oracle, finished[name], sampling)
    assert launches["local_decode"] > before[0]
    assert launches["group_decode"] > before[1]


def test_local_steps_keep_no_tables_of_leases_that_ended(engine, oracle):
  """They name rBlocks that the steps' own requests have by now."""
  long, own = sampling_of(4), sampling_of(8)
  name = engine.add_request(prompt_of(240), long, instance=0)
  check(oracle, drain(engine)[name], long)
  assert pools_are_empty(engine)
  before = engine.runner.launches["group_decode"]
  name = engine.add_request(prompt_of(120, 1), own, instance=1)
  check(oracle, drain(engine)[name], own)
  assert engine.runner.launches["group_decode"] == before
  hosted = engine.group.managers[1].hosted
  assert engine.runner._tables[1]._hosted == hosted.versions()


def test_slow_group_steps_get_smaller(checkpoint, oracle, monkeypatch):
  # Any step is slower than a nanosecond.
  engine = build(
    load(checkpoint, 2),
    num_instances=2,
    num_blocks=10,
    group_prefill_buckets=(16, 64),
    group_chunk_s=1e-9,
  )
  sizes = []
  group_step = engine.runner.group_step

  def noted(rows, slots, *, is_prefill, bucket=None):
    sizes.extend(len(r.token_ids) for mine in rows for r in mine if is_prefill)
    return group_step(rows, slots, is_prefill=is_prefill, bucket=bucket)

  monkeypatch.setattr(engine.runner, "group_step", noted)
  name = engine.add_request(prompt_of(250), sampling_of(2), instance=0)
  check(oracle, drain(engine)[name], sampling_of(2))
  # Two chunks of 64 at home, one to measure, and the rest.
  assert sizes == [64, 16, 16, 16, 10]


@pytest.mark.parametrize("is_many", [False, True])
def test_a_lot_of_buckets_is_warned_of(is_many, monkeypatch):
  warnings = []
  monkeypatch.setattr(
    warm_up.logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  # Ten more are of a layer each, and no bucket's.
  warm_up.warn_of_many_programs(
    engine_config(
      host_blocks=8,
      host_attention=True,
      prefill_buckets=range(8, 8 * (17 if is_many else 5), 8),
    )
  )
  expected = ["The buckets make 33 kinds of programs; more than 28 take long"]
  assert [w[: len(expected[0])] for w in warnings] == expected * is_many


class TestAbort:
  def test_a_waiting_request_ends(self, engine):
    name = engine.add_request(prompt_of(5), sampling_of(2))
    engine.abort(name)
    (output,) = engine.step()
    assert (output.request_id, output.finish_reason) == (name, "abort")
    assert output.token_ids == ()
    assert not engine.has_unfinished()

  @pytest.mark.parametrize("num_steps", [1, 3, 5, 7, 9, 12, 16, 20])
  def test_a_request_that_borrows_ends_at_any_time(self, engine, num_steps):
    name = engine.add_request(prompt_of(230), sampling_of(20), instance=0)
    outputs = steps(engine, num_steps)
    engine.abort(name)
    outputs += engine.step()
    assert outputs[-1].finish_reason == "abort"
    assert not engine.has_unfinished()
    assert pools_are_empty(engine)

  def test_others_go_on(self, engine, oracle):
    names = [
      engine.add_request(prompt_of(30, seed=n), sampling_of(10))
      for n in range(6)
    ]
    steps(engine, 4)
    for name in names[::2]:
      engine.abort(name)
    finished = drain(engine)
    for name in names[1::2]:
      check(oracle, finished[name], sampling_of(10))
    assert {finished[n].finish_reason for n in names[::2]} == {"abort"}

  def test_an_unknown_or_finished_request_is_left_alone(self, engine):
    name = engine.add_request(prompt_of(5), sampling_of(1))
    drain(engine)
    engine.abort(name)
    engine.abort("nobody")
    assert engine.step() == []


class TestBadRequests:
  @pytest.mark.parametrize(
    ("prompt", "options", "error_type", "message"),
    [
      ([], {}, RequestError, r"prompt must have at least one token; got none"),
      ([256], {}, RequestError, r"must be in \[0, 256\); got 256\."),
      (["a"], {}, RequestError, r"must be integers; got 'a'\."),
      (
        prompt_of(288),
        {},
        CapacityError,
        r"needs room for 289 tokens .* hold 288: 2 instance\(s\) of 144",
      ),
      ([5], {"instance": -1}, RequestError, r"in \[0, 2\); got -1\."),
      (
        [5],
        {"request_id": "taken"},
        RequestError,
        r"request_id must be unique .*; got 'taken' again\.",
      ),
    ],
  )
  def test_a_running_request_does_not_notice(
    self, engine, oracle, prompt, options, error_type, message
  ):
    engine.add_request(
      prompt_of(170), sampling_of(10), request_id="taken", instance=0
    )
    outputs = []
    while not outputs:
      outputs += engine.step()
    before = engine.pool_counts()
    with pytest.raises(error_type, match=message):
      engine.add_request(prompt, sampling_of(1), **options)
    assert engine.pool_counts() == before
    outputs += drain(engine).values()
    assert {output.request_id for output in outputs} == {"taken"}
    check(oracle, outputs[-1], sampling_of(10))

  def test_a_name_is_free_again_when_its_request_ended(self, engine):
    for _ in range(2):
      engine.add_request([5], sampling_of(1), request_id="again")
      assert list(drain(engine)) == ["again"]

  def test_a_made_name_is_one_that_no_caller_uses(self, engine):
    first = engine.add_request([5], sampling_of(1))
    number = int(first.removeprefix("request-"))
    taken = f"request-{number + 2}"
    engine.add_request([5], sampling_of(1), request_id=taken)
    made = engine.add_request([5], sampling_of(1))
    assert len({first, taken, made}) == 3
    assert set(drain(engine)) == {first, taken, made}

  def test_static_policy_reaches_one_pool_only(self, tiny):
    message = r"needs room for 129 tokens .* hold 128: 1 .* policy 'static'"
    with pytest.raises(CapacityError, match=message):
      tiny.add_request(prompt_of(128), sampling_of(1))
    name = tiny.add_request(prompt_of(127), sampling_of(9))
    assert len(drain(tiny)[name].token_ids) == 1

  def test_stop_strings_need_a_tokenizer(self, checkpoint, tmp_path):
    write_shallow_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    engine = build(load(tmp_path, 1), num_blocks=9)
    message = r"stop must be empty, .* no tokenizer.json; got \('x',\)\."
    with pytest.raises(RequestError, match=message):
      engine.check([5], SamplingParams(stop="x"))
    engine.check([5], SamplingParams())


_POISON = 7


@pytest.fixture(scope="module", name="poisoned")
def _poisoned_checkpoint(tmp_path_factory):
  folder = write_shallow_checkpoint(
    tmp_path_factory.mktemp("poisoned"), "llama2"
  )
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.embed_tokens.weight"][[0, _POISON]] = np.nan
  safetensors.numpy.save_file(tensors, file)
  return folder


@pytest.fixture(scope="module", name="poisoned_engine")
def _poisoned_engine(poisoned):
  return build(load(poisoned, 2), num_instances=2, num_blocks=10)


@pytest.fixture(scope="module", name="sound_oracle")
def _sound_oracle(tmp_path_factory):
  sound = write_shallow_checkpoint(tmp_path_factory.mktemp("sound"), "llama2")
  return SamplingOracle(load(sound, 1).dense(), MAX_TOKENS)


class TestLogitsThatAreNoDistribution:
  """In these weights token 7 is NaN, and so is what pads every program."""

  @pytest.mark.parametrize("way", WAYS)
  @pytest.mark.parametrize("length", [20, 200])
  def test_only_their_own_request_fails(
    self, poisoned_engine, sound_oracle, length, way
  ):
    engine = poisoned_engine
    sampling = sampling_of(6, **way)
    healthy = functools.partial(prompt_without_poison, length)
    first = engine.add_request(healthy(1), sampling, instance=0)
    poisoned = healthy(2)
    poisoned[length - 5] = _POISON
    ill = engine.add_request(poisoned, sampling, instance=0)
    beside = engine.add_request(
      prompt_without_poison(30, 3), sampling, instance=1
    )
    finished = drain(engine)
    assert pools_are_empty(engine)
    # It gets the rBlocks that the NaNs were written to.
    after = engine.add_request(healthy(4), sampling, instance=0)
    finished |= drain(engine)
    assert pools_are_empty(engine)

    assert finished[ill].finish_reason == "error"
    assert isinstance(finished[ill].error, ModelError)
    message = f"{ill}: the model gave logits .* at token {length}: a NaN"
    with pytest.raises(ModelError, match=message):
      raise finished[ill].error
    assert finished[ill].token_ids == ()
    for name in (first, beside, after):
      check_unless_poisoned(sound_oracle, finished[name], sampling)


def prompt_without_poison(length: int, seed: int) -> list[int]:
  return [token + (token == _POISON) for token in prompt_of(length, seed)]


def check_unless_poisoned(oracle, output, sampling):
  """A request that chose the poisoned tokens itself may fail after them."""
  if {0, _POISON} & set(output.token_ids):
    expected = oracle.tokens(
      list(output.prompt_token_ids), output.token_ids, sampling
    )
    assert list(output.token_ids) == expected
  else:
    check(oracle, output, sampling)
