"""Impossible clusters are refused before anything is simulated."""

import dataclasses
import math
import random

import pytest

from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.errors import ConfigError
from infinite_llm.simulator.cluster_config import ClusterConfig
from infinite_llm.simulator.scenario import draw_scenario


@pytest.mark.parametrize(
  ("field", "value", "text"),
  [
    ("num_instances", 0, "num_instances must be at least 1; got 0"),
    ("num_blocks", 1, "num_blocks must be at least 2; got 1"),
    ("host_blocks", -1, "host_blocks must be at least 0; got -1"),
    ("block_size", 0, "block_size must be at least 1; got 0"),
    ("tick_s", 0, "tick_s must be positive and finite; got 0"),
    ("request_every_s", -1, "request_every_s must be positive and finite; got"),
    ("crash_s", math.inf, "crash_s must be positive and finite; got inf"),
    ("payload_lost", 5.0, r"payload_lost must be in \[0, 1\]; got 5.0"),
    ("copy_lost", math.nan, r"copy_lost must be in \[0, 1\]; got nan"),
    ("clock_rate", 2.0, r"clock_rate must be in \[0, 1\); got 2.0"),
    ("min_messages", 1.5, r"min_messages must be an integer; got 1.5"),
    (
      "lending",
      LendingConfig(max_lent_blocks=100),
      "max_lent_blocks must be at most the pool's 9 rBlocks; got 100",
    ),
  ],
)
def test_impossible_scenarios_are_refused(field, value, text):
  drawn = draw_scenario(random.Random(0))
  scenario = dataclasses.replace(drawn, num_blocks=10)
  with pytest.raises(ConfigError, match=text):
    dataclasses.replace(scenario, **{field: value})


def test_to_attend_host_memory_there_must_be_some():
  drawn = draw_scenario(random.Random(0))
  text = "host_blocks must be at least 2; got 0"
  with pytest.raises(ConfigError, match=text):
    dataclasses.replace(drawn, host_attention=True, host_blocks=0)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"min_delay_s": -1}, r"min_delay_s and max_delay_s must be .* \(-1, 0.0"),
    ({"min_delay_s": 2}, r"min_delay_s and max_delay_s must be .* \(2, 0.001"),
    ({"most_s": math.inf}, "most_s must be positive and finite; got inf"),
    (
      {"lending": LendingConfig(headroom_blocks=4)},
      "headroom_blocks must be less than the pool's 4 rBlocks",
    ),
  ],
)
def test_impossible_clusters_are_refused(options, text):
  config = ClusterConfig(
    num_instances=2,
    num_blocks=5,
    lending=LendingConfig(),
    scheduler=SchedulerConfig(),
  )
  with pytest.raises(ConfigError, match=text):
    dataclasses.replace(config, **options)
