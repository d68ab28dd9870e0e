import dataclasses
import json

import numpy as np
import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.performance_model import (
  Load,
  PerformanceModel,
  Profile,
  cluster_throughput,
  coupled,
  load_performance_model,
)

# W(beta) = 6 beta; f goes from 2 to 6 between batches of 1 and 5.
# g is 100 up to 10 tokens and 200 from 20 on.
_MODEL = PerformanceModel(
  num_layers=2,
  work_per_token=6.0,
  batch_speed=Profile(at=(1, 5), per_s=(2, 6)),
  attention_speed=Profile(at=(10, 20), per_s=(100, 200)),
  exchange_s=0.5,
)


def test_a_profile_is_straight_between_points_and_flat_outside():
  profile = Profile(at=(10, 20, 40), per_s=(1, 3, 2))
  places = [5, 10, 15, 20, 30, 40, 99]
  values = [1, 1, 2, 3, 2.5, 2, 2]

  assert [profile(x) for x in places] == values
  assert profile.many(np.array(places, float)).tolist() == values


@pytest.mark.parametrize(
  ("batch", "tokens", "seconds"),
  [
    (0, 0, 0.0),
    (1, 0, 6 / 2),
    (3, 0, 18 / 4),
    (9, 0, 54 / 6),
    (0, 5, 5 / 100),
    (1, 15, 3 + 15 / 150),
    (5, 1000, 5 + 1000 / 200),
  ],
)
def test_a_layer_takes_its_work_and_its_attention(batch, tokens, seconds):
  assert _MODEL.layer_s(batch, tokens) == pytest.approx(seconds, rel=1e-12)
  many = _MODEL.layers_s(np.array([float(batch)]), np.array([float(tokens)]))
  assert many[0] == pytest.approx(seconds, rel=1e-12)


def test_throughput_counts_all_layers():
  assert _MODEL.throughput(3, 4.5) == 3 / 9
  assert _MODEL.throughput(0, 0.0) == 0.0


def test_debts_join_instances_also_through_others():
  assert coupled(range(6), [(3, 1), (4, 5), (1, 2)]) == {
    0: 0,
    1: 1,
    2: 1,
    3: 1,
    4: 4,
    5: 4,
  }


def test_those_who_step_together_take_the_time_of_the_slowest():
  loads = {
    0: Load(batch=1, tokens=0),  # 3 s
    1: Load(batch=3, tokens=0),  # 4.5 s
    2: Load(batch=5, tokens=1000),  # 10 s
  }

  alone = 1 / 6 + 3 / 9 + 5 / 20
  assert cluster_throughput(_MODEL, loads, []) == pytest.approx(alone)
  # With the exchange, 0 and 2 take 10.5 s.
  assert cluster_throughput(_MODEL, loads, [(0, 2)]) == pytest.approx(
    3 / 9 + 6 / 21
  )


def _document(**changes):
  return json.loads(json.dumps(dataclasses.asdict(_MODEL))) | changes


def test_a_model_is_read_from_a_file(tmp_path):
  path = tmp_path / "profile.json"
  path.write_text(json.dumps(_document(_source="drawn")))

  assert load_performance_model(path) == _MODEL


@pytest.mark.parametrize(
  ("text", "what"),
  [
    (None, "No such file"),
    ("[1", "Expecting"),
    ("[]", "no attribute"),
    (json.dumps(_document(speed=1)), "speed"),
    (json.dumps(_document(num_layers=0)), "num_layers must be at least 1"),
    (json.dumps(_document(batch_speed={"at": [1]})), "per_s"),
  ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text, what):
  path = tmp_path / "profile.json"
  if text is not None:
    path.write_text(text)

  with pytest.raises(ConfigError, match=rf"profile\.json.*{what}"):
    load_performance_model(path)


@pytest.mark.parametrize(
  ("fields", "text"),
  [
    ({"at": (), "per_s": ()}, r"at must be positive, finite and not empty"),
    ({"at": (0, 1), "per_s": (1, 1)}, r"at must be positive"),
    ({"at": (1, 1), "per_s": (1, 1)}, r"at must be rising; got \(1.0, 1.0\)"),
    ({"at": (1, 2), "per_s": (1,)}, r"as many values as at \(2\); got 1"),
    ({"at": (1,), "per_s": (float("nan"),)}, r"per_s must be positive"),
  ],
)
def test_a_profile_that_makes_no_sense_is_refused(fields, text):
  with pytest.raises(ConfigError, match=text):
    Profile(**fields)


@pytest.mark.parametrize(
  ("field", "value"),
  [("num_layers", 0), ("work_per_token", 0.0), ("exchange_s", -1.0)],
)
def test_a_model_that_makes_no_sense_is_refused(field, value):
  with pytest.raises(ConfigError, match=f"{field} must be .*got {value}"):
    dataclasses.replace(_MODEL, **{field: value})
