"""Steps that are planned and launched while the one before still runs."""

import numpy as np
import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import step_committer
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.sampler import Sampler, SampleRow, fetch
from infinite_llm.errors import ConfigError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.scheduler.fake_engine import make_request
from tests.testing import (
  SMALL_ENGINE,
  SamplingOracle,
  drain,
  pools_are_empty,
  write_shallow_checkpoint,
)

PENALTY = {"repetition_penalty": 1.7}
WAYS = ({}, PENALTY, {"temperature": 1.1, "seed": 4}, {"logprobs": 2})


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory):
  folder = write_shallow_checkpoint(tmp_path_factory.mktemp("async"))
  return load_hf(folder, make_mesh(1, 1), dtype="float32")


@pytest.fixture(scope="module", name="oracle")
def _oracle(model):
  return SamplingOracle(model.dense(), max_tokens=128)


def _engine(model, **sizes) -> Engine:
  sizes = {"block_size": 8, "num_blocks": 33} | sizes
  return Engine(model, engine_config(**(SMALL_ENGINE | sizes)))


@pytest.fixture(scope="module", name="ahead")
def _ahead(model):
  return _engine(model)


@pytest.fixture(name="engine")
def _checked(ahead):
  yield ahead
  assert drain(ahead) == {}
  assert pools_are_empty(ahead)


def _add(engine, length, count, *, ignore_eos=True, **way) -> str:
  prompt = np.random.default_rng(length).integers(3, 256, length).tolist()
  sampling = SamplingParams(max_tokens=count, ignore_eos=ignore_eos, **way)
  return engine.add_request(prompt, sampling)


def _check(oracle, output, **way) -> None:
  assert output.error is None
  prompt, answer = list(output.prompt_token_ids), output.token_ids
  assert list(answer) == oracle.tokens(prompt, answer, SamplingParams(**way))


def _steps_ahead(engine, monkeypatch) -> list[int]:
  """How many steps are behind the one that is fetched, each time."""
  ahead: list[int] = []
  already = engine.runner.launches.total()

  def count(pending):
    ahead.append(engine.runner.launches.total() - already - len(ahead) - 1)
    return fetch(pending)

  monkeypatch.setattr(step_committer, "fetch", count)
  return ahead


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_known(
  engine, oracle, monkeypatch
):
  ahead = _steps_ahead(engine, monkeypatch)
  name = _add(engine, 40, 6)
  output = drain(engine)[name]
  # Two chunks of the prompt, five decode steps, none behind the last.
  assert ahead == [1, 1, 1, 1, 1, 1, 0]
  _check(oracle, output)


def test_without_it_every_step_waits_for_the_one_before(
  model, oracle, monkeypatch
):
  engine = _engine(model, async_scheduling=False)
  ahead = _steps_ahead(engine, monkeypatch)
  _add(engine, 40, 6)
  drain(engine)
  assert set(ahead) == {0}
  names = [_add(engine, 20 + i, 5, **way) for i, way in enumerate(WAYS)]
  finished = drain(engine)
  for name, way in zip(names, WAYS, strict=True):
    _check(oracle, finished[name], **way)


def test_requests_join_and_end_while_steps_are_under_way(engine, oracle):
  names, finished = [], {}
  lengths = np.random.default_rng(0).integers(1, 60, 24).tolist()
  for i, length in enumerate(lengths):
    way = WAYS[i % len(WAYS)]
    names.append((_add(engine, length, 1 + i % 11, **way), way))
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output
  finished |= drain(engine)
  for name, way in names:
    _check(oracle, finished[name], **way)


def test_a_stop_that_nobody_foresaw_costs_one_row(engine, oracle):
  first = _add(engine, 30, 9)
  answer = drain(engine)[first].token_ids
  stop = answer[3]
  expected = answer[: answer.index(stop) + 1]
  before = engine.runner.launches["local_decode"]
  name = _add(engine, 30, 9, stop_token_ids=(stop,))
  while engine.is_unfinished(name):
    outputs = engine.step()
  (output,) = (each for each in outputs if each.request_id == name)
  assert output.finish_reason == "stop"
  assert output.token_ids == expected
  assert engine.runner.launches["local_decode"] - before == len(expected)
  # Its rBlocks and its slot go to others while the row too much still runs.
  heir = _add(engine, 33, 7, **PENALTY)
  _check(oracle, drain(engine)[heir], **PENALTY)


def test_who_is_aborted_leaves_no_trace(engine, oracle):
  doomed = _add(engine, 30, 20, **PENALTY)
  beside = _add(engine, 31, 12, **PENALTY)
  for _ in range(4):
    engine.step()
  engine.abort(doomed)
  heir = _add(engine, 29, 12, **PENALTY)
  finished = drain(engine)
  _check(oracle, finished[beside], **PENALTY)
  _check(oracle, finished[heir], **PENALTY)


def test_where_rblocks_run_short_nothing_is_launched_ahead(model, oracle):
  engine = _engine(model, num_blocks=13)  # 96 tokens for 3 x 44.
  names = [_add(engine, 30 + i, 14 - i, **PENALTY) for i in range(3)]
  finished = drain(engine)
  for name in names:
    _check(oracle, finished[name], **PENALTY)


def test_a_slot_goes_to_whoever_runs(ahead):
  """Also that of a request that waits again: it has seen its tokens anew."""
  runner = ahead.runner
  sampler = Sampler(
    0,
    runner.row_meshes[0],
    runner.programs,
    vocab_size=256,
    max_num_seqs=4,
    max_logprobs=5,
  )
  output = runner.local_step(0, [], is_prefill=False)

  def sample(*uids: int) -> list[int]:
    rows = [
      SampleRow(row=b, request=make_request(uid, 9), position=9)
      for b, uid in enumerate(uids)
    ]
    sampler.sample(output, rows)
    return [sampler.slot(uid) for uid in uids]

  slots = sample(1, 2, 3, 4)
  assert sorted(slots) == [0, 1, 2, 3]
  assert sample(1, 3, 4) == [slots[0], slots[2], slots[3]]
  assert sample(5, 3) == [slots[1], slots[2]]  # Longest unused: that of 2.
  assert sample(2) == [slots[0]]


def test_it_is_on_or_off():
  with pytest.raises(ConfigError, match="async_scheduling must be True or Fal"):
    engine_config(async_scheduling="no")
