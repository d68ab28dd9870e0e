import random

import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.simulator.fault_points import FaultPoints
from infinite_llm.types import FaultPoint


class _Shop:
  """As code with fault points is built."""

  def __init__(self, faults: FaultPoint | None = None):
    self._faults = faults

  def sell(self):
    return not (self._faults is not None and self._faults("till jams"))


def test_without_faults_nothing_goes_wrong():
  assert all(_Shop().sell() for _ in range(100))


def test_a_point_goes_wrong_about_as_often_as_asked_and_is_counted():
  faults = FaultPoints(random.Random(0), {"till jams": 0.3})
  shop = _Shop(faults)
  failed = sum(not shop.sell() for _ in range(1000))

  assert 250 < failed < 350
  assert faults.counts() == {"till jams": failed}


def test_certain_and_impossible_points():
  faults = FaultPoints(random.Random(0), {"always": 1.0, "never": 0.0})

  assert all(faults("always") for _ in range(100))
  assert not any(faults("never") for _ in range(100))
  assert not any(faults("unknown") for _ in range(100))
  assert faults.counts() == {"always": 100}


def test_the_same_seed_gives_the_same_faults():
  def history(seed):
    faults = FaultPoints(random.Random(seed), {"a": 0.5, "b": 0.1})
    return [faults(point) for point in "abba" * 20]

  assert history(3) == history(3)
  assert history(3) != history(4)


def test_points_that_no_code_passes_are_known():
  faults = FaultPoints(random.Random(0), {"till jam": 1.0, "till jams": 0.0})
  _Shop(faults).sell()

  assert faults.never_passed() == ("till jam",)


def test_what_is_no_probability_is_refused():
  with pytest.raises(ConfigError, match=r"'a' must be a probability; got 2"):
    FaultPoints(random.Random(0), {"a": 2})
