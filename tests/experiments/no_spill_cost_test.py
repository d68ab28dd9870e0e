"""The experiment in small: its cases are what they are called."""

import json

import jax
import pytest

from configs.no_spill_cost import get_config
from experiments import no_spill_cost
from experiments.steady_load import LoadShape, SteadyLoad
from infinite_llm.engine.outputs import Extent, OutputRecord, RequestOutput
from infinite_llm.errors import ConfigError

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
  config = get_config()
  config.platform = "cpu"
  config.num_instances = 2
  config.repeats = 1
  config.model.vocab_size = 64
  config.model.model_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 1
  config.model.num_q_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 16
  config.model.dtype = "float32"
  config.cache.block_size = 16
  config.cache.num_blocks = 33
  config.lending.headroom_blocks = 2
  config.lending.group_prefill_buckets = (32,)
  config.scheduler.max_num_seqs = 4
  config.scheduler.decode_buckets = (4,)
  config.scheduler.prefill_buckets = (64,)
  config.scheduler.prefill_rows = 4
  config.prefill.prompt_tokens = 128
  config.prefill.warm_steps = 1
  config.prefill.steps = 4
  config.decode.num_in_flight = 4
  config.decode.prompt_tokens = 16
  config.decode.max_tokens = 24
  config.decode.warm_steps = 4
  config.decode.steps = 12
  config.long.prompt_tokens = 700
  config.long.max_tokens = 60
  return config


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
  written = json.loads((tmp_path / "rows.json").read_text())
  assert written == {"rows": rows, "ratios": result["ratios"]}


@pytest.mark.bench
def test_a_case_that_lends_unasked_is_wrong(config, tmp_path, monkeypatch):
  # Batches that do not fit spill by themselves.
  monkeypatch.setattr(no_spill_cost, "_check", lambda config: None)
  config.decode.prompt_tokens = 160
  config.decode.max_tokens = 20
  config.long.run = False

  result = no_spill_cost.run(config, tmp_path)

  assert not result["correct"]
  assert any("something was lent" in fault for fault in result["faults"])


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("num_instances", 1, "num_instances must be at least 2; got 1"),
    ("repeats", 0, "repeats must be at least 1; got 0"),
    ("long.prompt_tokens", 512, "must be at least 513, more than an instance"),
    ("decode.prompt_tokens", 160, "decode must have at most 512 tokens"),
    ("decode.steps", 20, r"max_tokens must be more than warm_steps \+ steps"),
    ("platform", "gpu", "platform must be what JAX runs on, cpu; got 'gpu'"),
  ],
)
def test_what_cannot_work_is_refused(config, tmp_path, field, value, message):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=message):
    no_spill_cost.run(config, tmp_path)


class _Nobody:
  """Takes requests, and never answers."""

  def __init__(self):
    self.added = []

  def add_request(self, prompt, sampling, *, request_id, instance):
    self.added.append(request_id)


def _output(name: str, num_tokens: int, reason: str | None = None):
  return RequestOutput(
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


def test_a_window_counts_the_steps_behind_the_warm_ones():
  engine = _Nobody()
  load = SteadyLoad(
    engine,
    0,
    LoadShape(
      num_in_flight=2, prompt_tokens=3, max_tokens=4, warm_steps=1, steps=2
    ),
    name="x",
    seed=0,
    vocab_size=8,
  )
  load.fill()
  assert engine.added == ["x-0", "x-1"]
  load.take([_output("x-0", 1)], 10.0)
  load.take([], 11.0)
  load.take([_output("x-0", 2), _output("x-1", 1)], 12.0)
  assert not load.is_over
  load.take([_output("x-0", 3)], 13.0)
  assert not load.is_over  # Warm steps, the one that begins it, and steps.
  load.take([_output("x-0", 4, "length"), _output("x-1", 2)], 16.0)
  assert load.is_over

  seen = load.seen()

  assert (seen.steps, seen.window_s) == (2, 4.0)
  assert seen.prompt_tokens_per_s == 0
  assert seen.output_tokens_per_s == 3 / 4
  assert (seen.itl_ms, seen.itl_p99_ms) == (3000, 4000)
  assert load.answers == {"x-0": (0, 1, 2, 3)}
  load.fill()
  assert engine.added == ["x-0", "x-1", "x-2"]
  load.take([_output("x-1", 3, "stop")], 17.0)
  assert load.wrong == ["x-1: stop after 3 tokens, None"]
