import random

import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.simulator.fault_points import DeathError, FaultPoints


def test_a_point_goes_wrong_about_as_often_as_asked_and_is_counted():
  faults = FaultPoints(random.Random(0), {"till jams": 0.3})
  goes_wrong = faults.at(0)
  failed = sum(goes_wrong("till jams") for _ in range(1000))

  assert 250 < failed < 350
  assert faults.counts() == {"till jams": failed}


def test_certain_and_impossible_points():
  faults = FaultPoints(random.Random(0), {"always": 1.0, "never": 0.0})
  goes_wrong = faults.at(0)

  assert all(goes_wrong("always") for _ in range(100))
  assert not any(goes_wrong("never") for _ in range(100))
  assert not any(goes_wrong("unknown") for _ in range(100))
  assert faults.counts() == {"always": 100}


def test_whoever_passes_a_deadly_point_dies():
  faults = FaultPoints(random.Random(0), {Mishap.DEATH_BEFORE_ANSWER: 1.0})

  with pytest.raises(DeathError, match=r"3 died: death before answer") as death:
    faults.at(3)(Mishap.DEATH_BEFORE_ANSWER)

  assert death.value.address == 3
  assert faults.counts() == {"death before answer": 1}


def test_in_the_end_nothing_goes_wrong():
  faults = FaultPoints(random.Random(0), {"always": 1.0})
  goes_wrong = faults.at(0)
  faults.end()

  assert not goes_wrong("always")


def test_the_same_seed_gives_the_same_faults():
  def history(seed):
    goes_wrong = FaultPoints(random.Random(seed), {"a": 0.5, "b": 0.1}).at(0)
    return [goes_wrong(point) for point in "abba" * 20]

  assert history(3) == history(3)
  assert history(3) != history(4)


def test_what_is_no_probability_is_refused():
  with pytest.raises(ConfigError, match=r"'a' must be a probability; got 2"):
    FaultPoints(random.Random(0), {"a": 2})
