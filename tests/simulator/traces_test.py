import json
import math

import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.simulator.traces import (
  TraceConfig,
  TraceRequest,
  draw_trace,
  load_trace,
)

_TWO = (
  TraceRequest(arrival_s=0.5, prompt_tokens=10, output_tokens=2),
  TraceRequest(arrival_s=1.5, prompt_tokens=20, output_tokens=3),
)


def test_equal_seeds_draw_equal_traces():
  assert draw_trace(TraceConfig(seed=1)) == draw_trace(TraceConfig(seed=1))
  assert draw_trace(TraceConfig(seed=1)) != draw_trace(TraceConfig(seed=2))


def test_drawn_requests_keep_to_their_ranges():
  config = TraceConfig(
    num_requests=2000,
    requests_per_s=5.0,
    min_tokens=1000,
    max_tokens=60_000,
    min_output_tokens=16,
    max_output_tokens=32,
  )

  trace = draw_trace(config)

  contexts = [r.prompt_tokens + r.output_tokens for r in trace]
  assert len(trace) == 2000
  assert min(contexts) >= 1000
  assert max(contexts) <= 60_000
  assert {r.output_tokens for r in trace} == set(range(16, 33))
  assert [r.arrival_s for r in trace] == sorted(r.arrival_s for r in trace)
  # 400 s on average, with a standard deviation of 9 s.
  assert 350 < trace[-1].arrival_s < 450
  # Half of a log-uniform sample lies below the geometric mean.
  middle = math.sqrt(1000 * 60_000)
  assert 900 < sum(context < middle for context in contexts) < 1100


def test_requests_without_a_rate_come_at_once():
  trace = draw_trace(TraceConfig(num_requests=3, requests_per_s=math.inf))

  assert [request.arrival_s for request in trace] == [0.0, 0.0, 0.0]


def test_a_context_of_one_token_has_a_prompt_and_an_output():
  trace = draw_trace(TraceConfig(num_requests=2, max_tokens=1))

  assert {(r.prompt_tokens, r.output_tokens) for r in trace} == {(1, 1)}


def test_csv_is_read_by_arrival(tmp_path):
  path = tmp_path / "trace.csv"
  path.write_text("output_tokens,arrival_s,prompt_tokens\n3,1.5,20\n2,0.5,10\n")

  assert load_trace(path) == _TWO


def test_json_is_read_by_arrival(tmp_path):
  path = tmp_path / "trace.json"
  records = [
    {"arrival_s": 1.5, "prompt_tokens": 20, "output_tokens": 3},
    {"arrival_s": 0.5, "prompt_tokens": 10, "output_tokens": 2},
  ]
  path.write_text(json.dumps(records))

  assert load_trace(path) == _TWO


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.csv", "arrival_s,prompt_tokens\n1,2\n", "Request 0"),
    ("a.csv", "arrival_s,prompt_tokens,output_tokens\n1,2,x\n", "Request 0"),
    ("a.csv", "arrival_s,prompt_tokens,output_tokens\n1,0,1\n", "at least 1"),
    ("a.csv", "", "with requests"),
    ("a.json", "{", "must name a trace"),
    ("a.json", "[1]", "Request 0"),
    ("a.txt", "", "end in .csv or .json"),
  ],
)
def test_what_is_no_trace_is_refused(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)

  with pytest.raises(ConfigError, match=message):
    load_trace(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"none\.csv"):
    load_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_requests", 0),
    ("requests_per_s", 0.0),
    ("min_tokens", 0),
    ("min_output_tokens", 1000),
  ],
)
def test_impossible_traces_are_refused(name, value):
  with pytest.raises(ConfigError, match=name):
    TraceConfig(**{name: value})
