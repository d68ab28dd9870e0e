"""The experiment in small: its cases are what they are called."""

import json

import jax
import pytest

from experiments import case_processes, no_spill_cost, run
from experiments.case_log import CaseLog
from experiments.file_barrier import FileBarrier
from experiments.steady_load import LoadShape, SteadyLoad
from infinite_llm.engine.outputs import Extent, OutputRecord, RequestOutput
from infinite_llm.errors import ConfigError, GroupError
from tests.experiments.small_no_spill_cost import small_config

_CASES = (
  "alone",
  "separate",
  "sharing",
  "spilling, prefill",
  "spilling, decode",
)


@pytest.fixture(name="config")
def _config():
  # Before the experiment asks for less: all tests of a process share them.
  assert jax.device_count() == 4
  return small_config()


@pytest.mark.bench
def test_only_the_spilling_cases_lend(config, tmp_path):
  result = no_spill_cost.run(config, tmp_path)

  assert result["faults"] == []
  assert result["correct"]
  assert result["answers_compared"] > 0
  assert result["answers_different"] == 0
  rows = result["rows"]
  assert [(row["case"], row["instance"]) for row in rows] == [
    (case, instance) for case in _CASES for instance in (0, 1)
  ]
  for row in rows:
    assert row["versions"]["jax"]
    assert row["command"].startswith("python -m experiments.run")
    if row["instance"] == 1:
      assert row["steps"] > 0
      assert row["output_tokens_per_s"] > 0
      assert row["itl_p99_ms"] >= row["itl_ms"] > 0
    elif "owner" not in row:
      assert row["steps"] == 4
      assert row["prompt_tokens_per_s"] == pytest.approx(
        128 * row["output_tokens_per_s"]
      )
    if "owner" in row:
      assert row["lent"][0] == 0
      assert row["lent"][1] > 0
  assert result["launches"]["spilling, prefill"]["group_prefill"] > 0
  assert result["launches"]["spilling, decode"]["group_decode"] > 0
  assert len(result["ratios"]) == 2 * 5
  assert result["took_s"].keys() > set(_CASES)
  assert None not in result["took_s"].values()
  written = json.loads((tmp_path / "rows.json").read_text())
  assert written == {"rows": rows, "ratios": result["ratios"]}


@pytest.mark.bench
def test_a_case_that_lends_unasked_is_wrong(config, tmp_path, monkeypatch):
  # Batches that do not fit spill by themselves.
  monkeypatch.setattr(no_spill_cost, "_check", lambda config: None)
  config.decode.prompt_tokens = 160
  config.decode.max_tokens = 20
  config.cases = ("sharing",)
  earlier = {"case": "separate", "instance": 1, "tokens_per_s_of_runs": [1.0]}
  earlier |= {"itl_ms": 1.0, "itl_p99_ms": 1.0, "load": "decode"}
  config.earlier_rows = str(tmp_path / "rows.json")
  (tmp_path / "rows.json").write_text(json.dumps({"rows": [earlier]}))

  result = no_spill_cost.run(config, tmp_path)

  assert not result["correct"]
  assert any("something was lent" in fault for fault in result["faults"])
  assert {row["case"] for row in result["rows"]} == {"sharing"}
  (ratio,) = result["ratios"]
  assert (ratio["case"], ratio["to"]) == ("sharing", "separate")


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("cluster.num_instances", 1, "num_instances must be at least 2; got 1"),
    ("cluster.num_processes", 3, r"must be 1 or num_instances \(2\); got 3"),
    ("cluster.patience_s", 0.0, r"patience_s must be positive; got 0\.0"),
    ("cases", (), "cases must be some of alone, separate, sharing, spilling"),
    ("cases", ("sharing", "shared"), r"cases must be some of .*'shared'"),
    ("earlier_rows", "/none", r"must be empty or a rows\.json; got '/none'"),
    ("child.part", "alone", "part must be empty, separate or sharing; got"),
    ("repeats", 0, "repeats must be at least 1; got 0"),
    ("long.prompt_tokens", 512, "must be at least 513, more than an instance"),
    ("decode.prompt_tokens", 160, "decode must have at most 512 tokens"),
    ("decode.steps", 20, r"max_tokens must be more than warm_steps \+ steps"),
    (
      "cluster.platform",
      "gpu",
      "platform must be what JAX runs on, cpu; got 'gpu'",
    ),
  ],
)
def test_what_cannot_work_is_refused(config, tmp_path, field, value, message):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=message):
    no_spill_cost.run(config, tmp_path)


def test_processes_that_take_turns_need_somebody_to_take_them(config, tmp_path):
  config.cluster.num_processes = 2
  config.cases = ("separate", "spilling")
  with pytest.raises(ConfigError, match="cases must be with sharing too, if"):
    no_spill_cost.run(config, tmp_path)


class _Nobody:
  """Takes requests, and never answers."""

  def __init__(self):
    self.added = []

  def add_request(self, prompt, sampling, *, request_id, instance):
    self.added.append(request_id)


def _output(name: str, num_tokens: int, reason: str | None = None):
  return RequestOutput(
    uid=1,
    request_id=name,
    prompt_token_ids=(1, 2, 3),
    finish_reason=reason,
    error=None,
    instance=0,
    record=OutputRecord(
      token_ids=list(range(num_tokens)), pieces=[], logprobs=None
    ),
    extent=Extent(num_tokens, 0),
    seen=Extent(num_tokens - 1, 0),
  )


def _load(engine: _Nobody) -> SteadyLoad:
  shape = LoadShape(
    num_in_flight=2, prompt_tokens=3, max_tokens=4, warm_steps=1, steps=2
  )
  return SteadyLoad(engine, 0, shape, name="x", seed=0, vocab_size=8)


def test_a_window_counts_the_steps_behind_the_warm_ones():
  engine = _Nobody()
  load = _load(engine)
  load.fill()
  assert engine.added == ["x-0", "x-1"]
  load.take([_output("x-0", 1)], 10.0)
  load.take([], 11.0)
  load.take([_output("x-0", 2), _output("x-1", 1)], 12.0)
  assert not load.is_over
  load.take([_output("x-0", 3)], 13.0)
  load.take([_output("x-1", 2)], 14.0)
  # Both have begun, a warm step, the one that begins it, and steps.
  assert not load.is_over
  load.take([_output("x-0", 4, "length"), _output("x-1", 3)], 17.0)
  assert load.is_over

  seen = load.seen()

  assert (seen.steps, seen.window_s) == (2, 4.0)
  assert seen.prompt_tokens_per_s == 0
  assert seen.output_tokens_per_s == 3 / 4
  assert (seen.itl_ms, seen.itl_p99_ms) == (3000, 4000)
  assert load.answers == {0: (0, 1, 2, 3)}
  assert load.num_answered == 1
  load.fill()
  assert engine.added == ["x-0", "x-1", "x-2"]
  load.take([_output("x-1", 3, "stop")], 18.0)
  assert load.wrong == ["x-1: stop after 3 tokens, None"]


def test_a_load_that_ends_gives_up_what_is_left():
  class Aborting(_Nobody):
    def abort(self, request_id):
      self.aborted.append(request_id)

  engine = Aborting()
  engine.aborted = []
  load = _load(engine)
  load.fill()
  load.take([_output("x-1", 1)], 1.0)
  load.end()
  assert engine.aborted == ["x-0", "x-1"]
  load.take([_output("x-0", 0, "abort"), _output("x-1", 1, "abort")], 2.0)
  assert load.is_empty
  assert load.answers == {0: (), 1: (0,)}
  assert (load.num_answered, load.num_aborted, load.wrong) == (0, 2, [])


def test_answers_are_compared_as_far_as_both_go(tmp_path):
  log = CaseLog(is_exact=True)
  log.compare("one", {"a": (1, 2), "b": (), "c": (5,)})
  assert log.num_compared == 0
  log.compare("two", {"a": (1, 2, 3), "b": (4,), "c": (6, 7)})
  assert (log.num_compared, log.num_different) == (2, 1)
  assert log.faults == ["two: 1 answers are others"]
  log.write(tmp_path / "log.json")
  read = CaseLog.read(tmp_path / "log.json")
  assert read.faults == log.faults

  joined = CaseLog(is_exact=True)
  joined.compare("mine", {"a": (1, 2, 4)})
  joined.join("yours", read)
  assert (joined.num_compared, joined.num_different) == (3, 2)
  assert joined.faults[-1] == "yours: 1 answers are others"


def test_a_barrier_opens_when_all_are_there(tmp_path):
  one, two = (FileBarrier(tmp_path, n, 2, patience_s=0.05) for n in (0, 1))
  one.arrive("start")
  assert not one.is_complete("start")
  two.meet("start")
  assert one.is_complete("start")
  with pytest.raises(
    GroupError, match=r"come to 'end' within 0\.05 s .*; 1 did"
  ):
    one.meet("end")


class _Started:
  """Notes what would be started."""

  def __init__(self, commands):
    self._commands = commands

  def start(self, name, args, log, environment=None):
    self._commands[name] = (args, environment)

  def wait(self, look):
    look()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def test_each_process_has_gpus_and_a_part_of_its_own(
  config, tmp_path, monkeypatch
):
  commands = {}
  monkeypatch.setattr(
    case_processes, "ChildProcesses", lambda: _Started(commands)
  )
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
  config.cluster.platform = "gpu"
  config.cluster.tensor_parallel = 2
  config.cluster.num_processes = 2

  case_processes.run_in_processes(
    config, tmp_path, lambda: CaseLog(is_exact=True)
  )

  assert [*commands] == ["separate-0", "separate-1", "sharing"]
  # Separate and sharing engines have the GPUs together.
  together = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  gpus = [commands[f"separate-{n}"][1] for n in (0, 1)]
  assert gpus == [
    together | {"CUDA_VISIBLE_DEVICES": "7,5"},
    together | {"CUDA_VISIBLE_DEVICES": "3,1"},
  ]
  module, *args = commands["separate-1"][0][1:]
  assert module == "experiments.run"
  child, workdir = run.parse([module, *args])
  assert workdir == tmp_path / "separate-1"
  assert (child.child.part, child.child.instance) == ("separate", 1)
  assert child.scheduler.to_dict() == config.scheduler.to_dict()
  args, environment = commands["sharing"]
  assert args[1:4] == ["experiments.launch.local", "--num_processes=2", "--"]
  # The launcher shares out the GPUs that it sees.
  assert environment == together
