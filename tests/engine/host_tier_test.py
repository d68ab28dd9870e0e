"""Preempted requests wait in host memory, and give the tokens they would have.

Every move is verified by checksums. Engines are shared by tests, which leave
both tiers empty.
"""

import collections
import dataclasses
import random
import types

import numpy as np
import pytest

from infinite_llm.cache import host_pool
from infinite_llm.cache.host_memory import PINNED_LIMIT_VARIABLE
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import host_tier
from infinite_llm.engine.engine import Engine
from infinite_llm.errors import ConfigError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.swapping import Stage, _Swapped
from infinite_llm.types import Tier
from tests.testing import (
  SMALL_ENGINE,
  SamplingOracle,
  drain,
  lockstep,
  pools_are_empty,
  write_shallow_checkpoint,
)

BLOCK_SIZE = 16
MAX_TOKENS = 256


def load(path, num_instances, tensor_parallel=1):
  mesh = make_mesh(num_instances, tensor_parallel)
  return load_hf(path, mesh, dtype="float32")


def build(model, is_ready=lockstep, **options) -> Engine:
  options = (
    SMALL_ENGINE
    | {
      "block_size": BLOCK_SIZE,
      "num_blocks": 9,
      "host_blocks": 9,
      "verify_moves": True,
      "policy": "swap",
    }
    | options
  )
  return Engine(model, engine_config(**options), is_ready=is_ready)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module", name="oracle")
def _oracle(checkpoint):
  return SamplingOracle(load(checkpoint, 1).dense(), MAX_TOKENS)


def host_is_empty(engine) -> bool:
  counts = [m.counts(Tier.HOST) for m in engine.group.managers]
  return all(c.free == c.total for c in counts)


def is_clean(engine) -> bool:
  return (
    drain(engine) == {} and pools_are_empty(engine) and host_is_empty(engine)
  )


@pytest.fixture(scope="module", name="lonely_engine")
def _lonely_engine(checkpoint):
  return build(load(checkpoint, 1))


@pytest.fixture(name="engine")
def _engine(lonely_engine):
  """One instance of 8 rBlocks in HBM, 128 tokens, and 8 in host memory."""
  yield lonely_engine
  assert is_clean(lonely_engine)


@pytest.fixture(scope="module", name="lending_engine")
def _lending_engine(checkpoint):
  return build(
    load(checkpoint, 2, 2),
    num_instances=2,
    tensor_parallel=2,
    policy="borrow",
    host_blocks=17,
  )


@pytest.fixture(name="lenders")
def _lenders(lending_engine):
  """Two instances that lend, of two tensor ranks each."""
  yield lending_engine
  assert is_clean(lending_engine)


def prompt_of(length: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(3, 256, length).tolist()


def sampling_of(count: int, **options) -> SamplingParams:
  return SamplingParams(max_tokens=count, ignore_eos=True, **options)


WAYS = (
  {},
  {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5},
)


def check(oracle, output, sampling):
  """An answer is the oracle's, and has the length that was asked for."""
  assert output.error is None
  assert len(output.token_ids) == sampling.max_tokens
  prompt = list(output.prompt_token_ids)
  expected = oracle.tokens(prompt, output.token_ids, sampling)
  assert list(output.token_ids) == expected


def moved(engine) -> tuple[int, int]:
  """rBlocks that went to host memory, and that came back."""
  pools = engine.group.host_tiers.pools
  return (
    sum(pool.num_moved[Tier.HOST] for pool in pools),
    sum(pool.num_moved[Tier.HBM] for pool in pools),
  )


def count_recomputed(engine, monkeypatch) -> list:
  """Gives the uids that are preempted without their KV from now on."""
  uids = []
  for batcher in engine.batchers:

    def preempt(uid, preempt=batcher.preempt):
      uids.append(uid)
      preempt(uid)

    monkeypatch.setattr(batcher, "preempt", preempt)
  return uids


def add_two(engine, way=None) -> dict[str, SamplingParams]:
  """An elder request that will need the rBlocks of the younger one."""
  asked = {}
  for n, count in enumerate((50, 20)):
    sampling = sampling_of(count, **(way or {}))
    asked[engine.add_request(prompt_of(56 - n, n), sampling)] = sampling
  return asked


def stage_of(engine, name):
  entry = engine._book.find(name)
  if entry is None:
    return None
  swapping = engine.group.managers[entry.instance].swapping
  return swapping.stage(entry.request.uid)


@pytest.mark.parametrize("way", WAYS)
def test_a_preempted_request_goes_on_from_where_it_was(
  engine, oracle, monkeypatch, way
):
  recomputed = count_recomputed(engine, monkeypatch)
  before = moved(engine)
  asked = add_two(engine, way)
  younger = list(asked)[1]
  stages = []
  finished = {}
  while engine.has_unfinished():
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output
    stages.append(stage_of(engine, younger))
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert not recomputed
  out, back = np.subtract(moved(engine), before)
  assert out == back >= 3
  assert [s for s in dict.fromkeys(stages) if s] == [
    stage for stage in Stage if stage in stages
  ]
  assert Stage.WAITING in stages
  assert engine.num_unproved_rows == 0


def test_where_computing_again_is_faster_nothing_is_copied(
  engine, oracle, monkeypatch
):
  swapping = engine.group.managers[0].swapping
  slow = dataclasses.replace(swapping._host.costs, link_bytes_per_s=1.0)
  host = dataclasses.replace(swapping._host, costs=slow)
  monkeypatch.setattr(swapping, "_host", host)
  check_recomputed(engine, oracle, monkeypatch)


def test_where_host_memory_is_full_it_is_computed_again(
  engine, oracle, monkeypatch
):
  swapping = engine.group.managers[0].swapping
  uid = 10**6  # Waits there; two are left, and three are needed.
  swapping._swapped[uid] = _Swapped(
    uid=uid,
    stage=Stage.WAITING,
    home=(),
    host=swapping.host_pool.allocate(6, uid),
  )
  check_recomputed(engine, oracle, monkeypatch)
  swapping.drop(uid)


def check_recomputed(engine, oracle, monkeypatch):
  """The younger of two requests is computed again, and nothing is copied."""
  recomputed = count_recomputed(engine, monkeypatch)
  before = moved(engine)
  asked = add_two(engine)
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert recomputed
  assert moved(engine) == before


def test_many_requests_take_turns(engine, oracle, monkeypatch):
  before = moved(engine)
  asked = {}
  for n in range(9):
    sampling = sampling_of(12 + 5 * n % 23, **WAYS[n % 2])
    name = engine.add_request(prompt_of(10 + 11 * n % 60, seed=n), sampling)
    asked[name] = sampling
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  out, back = np.subtract(moved(engine), before)
  assert out > 0
  assert back > 0


def watch_moves(engine, monkeypatch) -> dict[str, int]:
  """Counts moves, those that waited, and those behind a long program."""
  seen = collections.Counter()
  tiers, in_flight = engine.group.host_tiers, engine._in_flight

  def watch(kind, instance, place, method):
    launch = getattr(place, method)

    def launched(*args, **kwargs):
      seen[kind] += 1
      seen["behind"] += in_flight.has_long_on(instance)
      return launch(*args, **kwargs)

    monkeypatch.setattr(place, method, launched)

  for instance, host in zip(engine.instances, tiers.pools, strict=True):
    watch("out", instance, host, "_begin_leaving")
    watch("in", instance, host, "_begin_entering")
    watch("enter", instance, host, "_end_entering")
  for instance, store in zip(engine.instances, tiers.slabs, strict=False):
    watch("slab", instance, store, "leave")
  advance = tiers.advance

  def advanced(managers, has_long_on):
    waits = tiers._is_copying and any(map(has_long_on, engine.instances))
    seen["waited"] += waits
    return advance(managers, has_long_on)

  monkeypatch.setattr(tiers, "advance", advanced)
  return seen


def test_no_move_is_launched_behind_a_long_program(
  checkpoint, oracle, monkeypatch
):
  """Chunks of prompts are under way in most steps, and some for long."""
  rng = random.Random(0)
  engine = build(
    load(checkpoint, 1),
    is_ready=lambda array: rng.random() < 0.5 and lockstep(array),
    prefill_buckets=(16,),
    prefill_rows=1,
    num_blocks=13,
  )
  seen = watch_moves(engine, monkeypatch)
  asked = {}
  for n in range(24):
    sampling = sampling_of(1 if n % 2 else 60)
    name = engine.add_request(prompt_of(20 + 9 * n % 50, seed=n), sampling)
    asked[name] = sampling
  finished = {}
  while engine.has_unfinished():
    outputs = engine.step(meanwhile=lambda: True)  # Waits for nothing.
    finished |= {each.request_id: each for each in outputs if each.is_finished}
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert min(seen[kind] for kind in ("out", "in", "enter", "waited")) > 0
  assert seen["behind"] == 0
  assert is_clean(engine)


def test_a_prompt_of_many_chunks_holds_no_move_up(
  checkpoint, oracle, monkeypatch
):
  """Else another chunk would follow each one, and be under way at any time."""
  engine = build(load(checkpoint, 1), prefill_buckets=(16,), num_blocks=17)
  seen = watch_moves(engine, monkeypatch)
  asked = {}
  # The first needs what the second has. When it has ended the second comes back
  # while the third, of seven chunks, is computed.
  for n, (length, count) in enumerate([(120, 60), (110, 60), (100, 4)]):
    sampling = sampling_of(count)
    asked[engine.add_request(prompt_of(length, seed=n), sampling)] = sampling
  third = list(asked)[2]
  entered_at, finished = [], {}
  while engine.has_unfinished():
    before = seen["enter"]
    finished |= {o.request_id: o for o in engine.step() if o.is_finished}
    if seen["enter"] > before:
      entered_at.append(engine.progress(third))
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert entered_at
  assert all(0 < computed < total for computed, total in entered_at)
  assert seen["waited"] <= 1  # For the chunk that was planned with it.
  assert seen["behind"] == 0
  assert is_clean(engine)


def test_a_prompt_gets_on_while_a_slow_link_is_busy(
  checkpoint, oracle, monkeypatch
):
  """With a decode step under way at any time, all plans are behind one."""
  num_looks = collections.Counter()
  is_over = host_pool._Batch.is_over

  def is_over_late(batch):
    num_looks[id(batch)] += 1
    return num_looks[id(batch)] >= 40 and is_over(batch)

  monkeypatch.setattr(host_pool._Batch, "is_over", is_over_late)
  engine = build(
    load(checkpoint, 1), prefill_buckets=(16,), num_blocks=33, host_blocks=33
  )
  asked = {}

  def add(length, count, seed):
    sampling = sampling_of(count)
    name = engine.add_request(prompt_of(length, seed), sampling)
    asked[name] = sampling
    return name

  add(8, 60, 0)
  swapped = add(100, 8, 1)
  while engine.progress(swapped)[0] < 100:
    engine.step()
  prompt = add(100, 4, 2)
  while engine.progress(prompt)[0] == 0:  # Later nobody overtakes the second.
    engine.step()
  while engine._in_flight:  # All are to be at rest where one is set aside.
    engine._planner.hold()
    engine._commit(engine._in_flight.wait())
  engine.batchers[0].set_aside(engine._book.find(swapped).request.uid)
  finished, num_steps = {}, 0
  while prompt not in finished:
    num_steps += 1
    finished |= {o.request_id: o for o in engine.step() if o.is_finished}
  assert engine.group.host_tiers.is_moving(0)
  assert num_steps < 30
  finished |= drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert is_clean(engine)


def test_instances_that_lend_swap_what_is_at_home(lenders, oracle):
  """Borrowing comes first: requests are preempted once nobody has room."""
  before = moved(lenders)
  asked = {}
  for n in range(8):
    sampling = sampling_of(30 + n, **WAYS[n % 2])
    name = lenders.add_request(
      prompt_of(40 + 3 * n, seed=n), sampling, instance=n % 2
    )
    asked[name] = sampling
  asked[lenders.add_request(prompt_of(160, 20), sampling_of(6), instance=0)] = (
    sampling_of(6)
  )
  finished = drain(lenders)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  out, back = np.subtract(moved(lenders), before)
  assert out > 0
  assert back > 0
  assert lenders.group.num_blocks_moved > 0
  assert lenders.num_unproved_rows == 0


def num_steps(engine) -> int:
  add_two(engine)
  count = 0
  while engine.has_unfinished():
    engine.step()
    count += 1
  return count


@pytest.mark.parametrize(
  "ended",
  [pytest.param(0, marks=pytest.mark.slow), 1],
  ids=["elder", "younger"],
)
def test_either_may_be_aborted_after_any_step(engine, oracle, ended):
  stages = set()
  for step in range(0, num_steps(engine), 2):
    asked = add_two(engine)
    names = list(asked)
    finished = {}
    for _ in range(step):
      for output in engine.step():
        if output.is_finished:
          finished[output.request_id] = output
    stages.add(stage_of(engine, names[1]))
    engine.abort(names[ended])
    finished |= drain(engine)
    other = names[1 - ended]
    check(oracle, finished[other], asked[other])
    assert pools_are_empty(engine)
    assert host_is_empty(engine)
  assert Stage.WAITING in stages


@pytest.mark.parametrize("stage", [Stage.LEAVING, Stage.ENTERING])
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_a_copy_may_end_before_and_after_an_abort(
  engine, oracle, monkeypatch, stage, is_late
):
  """Neither end is given to anybody else while it is being written to."""
  asked = add_two(engine)
  elder, younger = asked
  finished = {}

  def step():
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output

  while stage_of(engine, younger) is not stage:
    if stage is not Stage.ENTERING or elder in finished:
      with monkeypatch.context() as patch:  # The link is slow from now on.
        patch.setattr(host_pool._Batch, "is_over", lambda _: False)
        step()
    else:
      step()
  monkeypatch.setattr(host_pool._Batch, "is_over", lambda _: False)
  assert engine.settle()  # A slow link is no stall.
  host = engine.group.managers[0].counts(Tier.HOST)
  assert host.free < host.total
  assert engine.use().instances[0].host_counts == host
  if not is_late:
    monkeypatch.undo()
    while stage_of(engine, younger) is stage:
      engine.settle()
  engine.abort(younger)
  if is_late:
    engine.settle()
    assert not host_is_empty(engine)
    monkeypatch.undo()
  finished |= drain(engine)
  check(oracle, finished[elder], asked[elder])
  assert pools_are_empty(engine)
  assert host_is_empty(engine)


@pytest.mark.parametrize("name", ["engine", "lenders"])
def test_random_schedules_end_right_and_leave_nothing(name, oracle, request):
  engine = request.getfixturevalue(name)
  longest = 70 if name == "engine" else 110
  for seed in range(3):
    rng = np.random.default_rng(seed)
    arrivals = sorted(rng.integers(0, 30, 7).tolist())
    aborts = rng.integers(5, 80, 2).tolist()
    asked, finished, step = {}, {}, 0
    while arrivals or engine.has_unfinished():
      while arrivals and arrivals[0] <= step:
        arrivals.pop(0)
        prompt = prompt_of(int(rng.integers(1, longest)), int(rng.integers(99)))
        sampling = sampling_of(int(rng.integers(2, 36)), **rng.choice(WAYS))
        asked[engine.add_request(prompt, sampling)] = sampling
      if step in aborts and asked:
        engine.abort(str(rng.choice(list(asked))))
      for output in engine.step():
        if output.is_finished:
          finished[output.request_id] = output
      step += 1
    for asked_name, sampling in asked.items():
      if finished[asked_name].finish_reason != "abort":
        check(oracle, finished[asked_name], sampling)
    assert is_clean(engine)


def test_kv_that_is_not_what_left_is_computed_again(
  engine, oracle, monkeypatch
):
  """Its step proves nothing, and no token comes of it."""
  failed = engine.num_unproved_rows
  asked = add_two(engine)
  younger = list(asked)[1]
  while stage_of(engine, younger) is not Stage.WAITING:
    engine.step()
  pool = engine.group.host_tiers.pools[0]
  monkeypatch.setattr(pool, "_tag", pool._tag * 0)
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert engine.num_unproved_rows > failed


def test_warm_up_compiles_the_moves(checkpoint, oracle):
  engine = build(load(checkpoint, 1))
  engine.warm_up()
  asked = add_two(engine)
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert moved(engine)[1] > 0
  assert engine.runner.programs.num_late_compiles == 0
  assert len(engine.runner.programs) == engine.config.num_program_kinds
  assert is_clean(engine)


def test_more_host_memory_than_there_is_is_refused(checkpoint):
  with pytest.raises(ConfigError, match="host_blocks must fit in the host"):
    build(load(checkpoint, 1), host_blocks=10**12)


@pytest.fixture(name="on_gpus")
def _on_gpus(monkeypatch):
  """Has host memory be limited as on GPUs, to 1 GiB and its margin."""
  gpus = types.SimpleNamespace(default_backend=lambda: "gpu")
  monkeypatch.setattr(host_tier, "jax", gpus)
  monkeypatch.setenv(PINNED_LIMIT_VARIABLE, "2")


@pytest.mark.parametrize("host_attention", [False, True])
def test_more_than_gpus_may_pin_is_refused_before_it_is_allocated(
  host_attention, checkpoint, on_gpus, monkeypatch
):
  """Two instances have little more than half a GiB each."""
  model = load(checkpoint, 2)
  options = {"num_instances": 2, "policy": "borrow"}
  probe = build(model, host_blocks=0, **options)
  host_blocks = 2 + (1 << 29) // probe.runner.pool.block_bytes

  def allocate(*args, **kwargs):
    raise AssertionError("Nothing must be allocated.")

  monkeypatch.setattr(host_tier, "HostPool", allocate)
  monkeypatch.setattr(host_tier, "SlabStore", allocate)
  options |= {"host_blocks": host_blocks, "host_attention": host_attention}
  with pytest.raises(
    ConfigError,
    match=(
      f"{PINNED_LIMIT_VARIABLE} must be at least 3 when JAX starts, for"
      rf" host_blocks={host_blocks} .*; got 2\."
    ),
  ):
    build(model, **options)


def test_what_gpus_may_pin_is_allocated(checkpoint, on_gpus):
  assert len(build(load(checkpoint, 1)).group.host_tiers.pools) == 1
