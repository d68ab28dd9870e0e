"""Requests larger than all HBM attend host memory, and give the same tokens.

Every copy is verified. Engines are shared by tests, which leave both tiers
empty.
"""

import jax
import numpy as np
import pytest

from infinite_llm.cache import slab_store
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.errors import CapacityError, ConfigError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.account import Phase
from infinite_llm.types import Tier
from tests.engine.host_tier_test import watch_moves
from tests.testing import (
  GOLDEN,
  SMALL_ENGINE,
  GreedyOracle,
  SamplingOracle,
  drain,
  lockstep,
  pools_are_empty,
  write_shallow_checkpoint,
)
from tests.tolerances import tolerance

BLOCK_SIZE = 16
MAX_TOKENS = 640
WAYS = (
  {},
  {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5},
)


def load(path, num_instances=1, tensor_parallel=1):
  mesh = make_mesh(num_instances, tensor_parallel)
  return load_hf(path, mesh, dtype="float32")


def build(model, **options) -> Engine:
  """Of 8 rBlocks in HBM, 128 tokens, a long request keeps 4; 32 in HOST."""
  options = (
    SMALL_ENGINE
    | {
      "block_size": BLOCK_SIZE,
      "num_blocks": 9,
      "host_blocks": 33,
      "host_attention": True,
      "verify_moves": True,
    }
    | options
  )
  return Engine(model, engine_config(**options), is_ready=lockstep)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("layered")
  return write_shallow_checkpoint(folder, num_layers=2)


@pytest.fixture(scope="module", name="oracle")
def _oracle(checkpoint):
  return SamplingOracle(load(checkpoint).dense(), MAX_TOKENS)


@pytest.fixture(scope="module", name="lonely_engine")
def _lonely_engine(checkpoint):
  engine = build(load(checkpoint))
  engine.warm_up()
  assert not engine.runner.launches
  return engine


@pytest.fixture(name="engine")
def _engine(lonely_engine):
  yield lonely_engine
  assert is_clean(lonely_engine)
  assert lonely_engine.runner.programs.num_late_compiles == 0


def host_is_empty(engine) -> bool:
  counts = [m.counts(Tier.HOST) for m in engine.group.managers]
  tiers = engine.group.host_tiers
  return all(c.free == c.total for c in counts) and not any(
    store._slabs or store._leaving for store in tiers.slabs
  )


def is_clean(engine) -> bool:
  """Both tiers are empty, and nobody ever said what no sane sender would."""
  return (
    drain(engine) == {}
    and pools_are_empty(engine)
    and host_is_empty(engine)
    and engine.group.num_refused == 0
  )


def prompt_of(length: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(3, 256, length).tolist()


def sampling_of(count: int, **options) -> SamplingParams:
  return SamplingParams(max_tokens=count, ignore_eos=True, **options)


def add(engine, length, count, text=0, instance=None, **way):
  """Adds a request; gives its name and what to check it by."""
  sampling = sampling_of(count, **way)
  name = engine.add_request(
    prompt_of(length, text), sampling, instance=instance
  )
  return name, sampling


def check(oracle, output, sampling):
  """An answer is the oracle's, and has the length that was asked for."""
  assert output.error is None
  assert len(output.token_ids) == sampling.max_tokens
  prompt = list(output.prompt_token_ids)
  expected = oracle.tokens(prompt, output.token_ids, sampling)
  assert list(output.token_ids) == expected


def request_of(engine, name):
  return engine._book.find(name).request


def num_host(engine, name) -> int:
  """rBlocks of a running request in host memory."""
  entry = engine._book.find(name)
  manager = engine.group.managers[entry.instance]
  is_open = entry.request in engine.batchers[entry.instance].running
  return manager.table(entry.request.uid).num_host if is_open else 0


def step_until(engine, condition, max_steps=2000):
  """Steps; gives the last outputs of requests that ended."""
  finished = {}
  for _ in range(max_steps):
    if condition():
      return finished
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output
  raise AssertionError(f"not so after {max_steps} steps")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [129, 256, 383, 520])
def test_a_context_of_several_hbms_gives_the_dense_tokens(
  engine, oracle, length, way
):
  before = dict(engine.runner.launches)
  unproved = engine.num_unproved_rows
  asked = dict([add(engine, length, 20, **way)])
  asked |= dict([add(engine, 9 + n, 12, text=n, **WAYS[n % 2]) for n in (1, 2)])
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  launches = engine.runner.launches
  assert launches["layered_prefill"] > before.get("layered_prefill", 0)
  assert launches["layered_decode"] >= before.get("layered_decode", 0) + 19
  assert engine.num_unproved_rows == unproved


def test_what_fits_in_hbm_never_leaves_it(engine, oracle):
  before = dict(engine.runner.launches)
  asked = dict(add(engine, 100 - n, 12, text=n) for n in range(3))
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  for kind in ("layered_prefill", "layered_decode"):
    assert engine.runner.launches[kind] == before.get(kind, 0)


def test_a_request_outgrows_hbm_while_it_decodes(engine, oracle):
  """It stays where it is: nothing is computed twice."""
  (name, sampling), before = add(engine, 100, 60), dict(engine.runner.launches)
  finished = drain(engine)
  check(oracle, finished[name], sampling)
  launches = engine.runner.launches
  decoded = sum(
    launches[kind] - before.get(kind, 0)
    for kind in ("layered_decode", "local_decode")
  )
  assert decoded == 59
  assert launches["layered_decode"] > before.get("layered_decode", 0)


def test_a_second_long_request_waits_and_short_ones_overtake_it(engine, oracle):
  first = add(engine, 300, 12)
  second = add(engine, 280, 6, text=1)
  short = add(engine, 20, 4, text=2)
  step_until(engine, lambda: not engine.is_unfinished(short[0]))
  assert engine.is_unfinished(first[0])
  assert request_of(engine, second[0]).num_computed_tokens == 0
  finished = drain(engine)
  check(oracle, finished[first[0]], first[1])
  check(oracle, finished[second[0]], second[1])


def test_no_slab_leaves_behind_a_long_program(engine, oracle, monkeypatch):
  seen = watch_moves(engine, monkeypatch)
  asked = dict(add(engine, 60, 40 + n, text=n) for n in range(1, 3))
  asked |= dict([add(engine, 300, 12)])
  asked |= dict(add(engine, 60, 1, text=n) for n in range(3, 9))
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert seen["slab"] > 0
  assert seen["behind"] == 0


def test_it_gives_way_to_elder_requests(engine, oracle):
  """They need more than half of HBM; its own part goes to HOST instead."""
  elder = [add(engine, 16, 44, text=n) for n in range(2)]
  long = add(engine, 200, 10, text=9)
  asked = dict([*elder, long])
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)


@pytest.mark.slow
def test_preempted_requests_give_host_memory_up(checkpoint, oracle):
  """What waits there for HBM is computed again when a long one needs it."""
  engine = build(load(checkpoint), host_blocks=17, policy="swap")
  asked = dict([add(engine, 40, 56), add(engine, 50, 40, text=1)])
  younger = list(asked)[1]
  swapping = engine.group.managers[0].swapping
  uid = request_of(engine, younger).uid
  step_until(engine, lambda: swapping.stage(uid) is not None)
  name, sampling = add(engine, 260, 8, text=2)
  asked[name] = sampling
  finished = drain(engine)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert is_clean(engine)


def num_steps(engine, monkeypatch, length, **options) -> int:
  """Steps of a request; from now on as many every time, as copies are awaited.

  Args:
    engine: One that has nothing to do.
    monkeypatch: Ends it.
    length: Tokens of the prompt; six more are asked for.
    **options: As of `add`.
  """

  def is_done(leaving) -> bool:
    return bool(jax.block_until_ready(leaving.slab.layers))

  monkeypatch.setattr(slab_store.LeavingSlab, "is_done", property(is_done))
  add(engine, length, 6, **options)
  count = 0
  while engine.has_unfinished():
    engine.step()
    count += 1
  return count


def test_it_may_be_aborted_after_any_step(engine, oracle, monkeypatch):
  seen = set()
  for step in range(num_steps(engine, monkeypatch, 200)):
    name, _ = add(engine, 200, 6)
    short = add(engine, 20, 4, text=3)
    for _ in range(step):
      engine.step()
    entry = engine._book.find(name)
    if entry is not None:
      manager = engine.group.managers[0]
      if entry.request in engine.batchers[0].running:
        seen.add((manager.phase(entry.request.uid), num_host(engine, name) > 0))
    is_short_left = engine.is_unfinished(short[0])
    engine.abort(name)
    finished = drain(engine)
    if is_short_left:
      check(oracle, finished[short[0]], short[1])
    assert pools_are_empty(engine)
    assert host_is_empty(engine)
  assert (Phase.IDLE, True) in seen
  assert (Phase.OVERFLOWING, True) in seen


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_a_copy_may_end_before_and_after_an_abort(
  engine, oracle, monkeypatch, is_late
):
  """Neither end is given to anybody else while it is being written to."""
  name, _ = add(engine, 200, 6)
  manager = engine.group.managers[0]
  uid = request_of(engine, name).uid
  step_until(engine, lambda: num_host(engine, name) > 0)
  with monkeypatch.context() as patch:
    patch.setattr(slab_store.LeavingSlab, "is_done", False)
    step_until(engine, lambda: manager.phase(uid) is Phase.OVERFLOWING)
    assert engine.settle()  # A slow link is no stall.
    if is_late:
      engine.abort(name)
      engine.settle()
      slab = engine.config.cache.slab_blocks
      for tier in Tier:
        counts = manager.counts(tier)
        assert counts.total - counts.free == slab, tier
      again = add(engine, 200, 6)  # Under way beside the old copy.
      engine.step()
  if is_late:
    finished = drain(engine)
    check(oracle, finished[again[0]], again[1])
  else:
    step_until(engine, lambda: manager.phase(uid) is Phase.IDLE)
    engine.abort(name)
    drain(engine)


def spoil(engine, name, fault: str) -> None:
  """Disturbs what a request has in host memory; no book knows."""
  uid = request_of(engine, name).uid
  store = engine.group.host_tiers.slabs[0]
  slabs = store._slabs[uid]
  match fault:
    case "untagged":
      slab = slabs[1]
      slabs[1] = slab_store.HeldSlab(
        layers=slab.layers, tag=slab.tag * 0, tables=slab.tables
      )
    case "swapped":  # Each with its tags, in the other's place.
      a, b = slabs[:2]
      slabs[0], slabs[1] = (
        slab_store.HeldSlab(layers=x.layers, tag=x.tag, tables=y.tables)
        for x, y in ((b, a), (a, b))
      )
    case "missing":
      del slabs[1]
    case "twice":
      slabs[1] = slabs[0]


@pytest.mark.parametrize("fault", ["untagged", "swapped", "missing", "twice"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_spoilt_rblock_in_host_is_noticed_and_computed_again(
  engine, oracle, fault, when
):
  """Its step proves nothing, and no token comes of it."""
  name, sampling = add(engine, 280, 8)
  short = add(engine, 20, 6, text=4)
  request = request_of(engine, name)
  unproved = engine.num_unproved_rows
  finished = step_until(
    engine,
    lambda: (
      num_host(engine, name) >= 6
      and (when == "prefill" or len(request.output_token_ids) == 3)
    ),
  )
  answered = list(request.output_token_ids)
  spoil(engine, name, fault)
  finished |= step_until(engine, lambda: engine.num_unproved_rows > unproved)
  assert request.output_token_ids == answered
  finished |= drain(engine)
  check(oracle, finished[name], sampling)
  check(oracle, finished[short[0]], short[1])
  assert engine.num_unproved_rows == unproved + 1


def test_a_copy_that_was_not_what_the_books_say_proves_nothing(
  engine, oracle, monkeypatch
):
  """The rBlock loses its tag in HBM before it leaves."""
  name, sampling = add(engine, 200, 6)
  step_until(engine, lambda: num_host(engine, name) == 2)
  store, unproved = engine.group.host_tiers.slabs[0], engine.num_unproved_rows
  with monkeypatch.context() as patch:
    leave = store.leave

    def leave_untagged(pool, *rest):
      patch.undo()
      return leave(pool._replace(tag=pool.tag * 0), *rest)

    patch.setattr(store, "leave", leave_untagged)
    step_until(engine, lambda: engine.num_unproved_rows > unproved)
  finished = drain(engine)
  check(oracle, finished[name], sampling)
  assert engine.num_unproved_rows == unproved + 1


def test_warm_up_compiles_all_of_it(engine):
  """After each test of this engine, that it compiled nothing is checked."""
  assert len(engine.runner.programs) == engine.config.num_program_kinds


def test_a_prompt_beyond_both_tiers_is_refused(engine):
  """4 rBlocks of 16 in HBM, and 32 in host memory."""
  assert engine.capacity_tokens == 576
  with pytest.raises(
    CapacityError, match=r"577 tokens .* hold 576: .* \(576 with host memory"
  ):
    engine.add_request(prompt_of(576), sampling_of(1))


def test_the_largest_context_is_filled_to_its_last_token(engine, oracle):
  name, sampling = add(engine, 560, 16)
  finished = drain(engine)
  check(oracle, finished[name], sampling)


def test_host_memory_that_adds_nothing_is_refused(checkpoint):
  """8 rBlocks are in HBM; 4 and 4 are no more."""
  model = load(checkpoint)
  with pytest.raises(
    ConfigError, match=r"room for more than 4 rBlocks .* got 6, room for 4"
  ):
    build(model, host_blocks=6)


@pytest.mark.slow
def test_float8_gives_the_tokens_of_a_model_that_rounds_alike(checkpoint):
  """They are rounded once, and multiplied by their scales wherever they are."""
  model = load(checkpoint, 1, 2)
  shape = (2, 2, model.config.num_kv_heads)
  # All different, so that one head's or layer's is seen to be no other's.
  scales = 0.01 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)
  kind = "float8_e4m3fn"
  engine = build(model, tensor_parallel=2, kv_dtype=kind, kv_scales=scales)
  names = [add(engine, length, 16)[0] for length in (383, 20)]
  finished = drain(engine)
  assert is_clean(engine)
  assert engine.runner.launches["layered_decode"] >= 15
  dense = load(checkpoint).dense()

  def differences(kv_scales):
    oracle = GreedyOracle(dense, MAX_TOKENS, kind, kv_scales)
    return [
      oracle.first_difference(
        list(finished[name].prompt_token_ids),
        list(finished[name].token_ids),
        tolerance("float32", kind).greedy_tie,
      )
      for name in names
    ]

  assert not any(differences(scales))
  assert differences(scales[::-1])[0]
  assert engine.num_unproved_rows == 0


def test_a_model_with_windows_is_refused():
  model = load(GOLDEN / "mistral_window")
  with pytest.raises(ConfigError, match="False for a model with sliding"):
    build(model)
