import collections

import pytest

from configs.control_plane_bench import get_config
from experiments import control_plane_bench
from experiments.drawn_cluster import draw_heartbeats


@pytest.fixture
def config():
  config = get_config()
  config.repeats = 2
  config.cluster.num_instances = (8, 16)
  config.cluster.num_blocks = 16_000
  config.step.rows = 4
  config.step.waiting = 5
  config.step.steps = 70  # All rows need an rBlock at some time.
  return config


@pytest.mark.bench
def test_every_size_is_timed_and_its_plans_are_sound(config, tmp_path):
  result = control_plane_bench.run(config, tmp_path)

  assert [row["num_instances"] for row in result["clusters"]] == [8, 16]
  assert result["correct"]
  for step in (result["step"], result["lockstep"]):
    assert (step["rows"], step["num_waiting"]) == (4, 5)
    assert step["step_best_ms"] <= step["step_ms"] <= step["step_max_ms"]
    assert step["step_p99_ms"] <= step["step_max_ms"]
    assert step["advance_ms"] > 0
  for row in result["clusters"]:
    assert row["num_moves"] > 0
    assert row["num_recalls"] > 0
    assert row["num_requests"] > row["num_instances"]
  assert (tmp_path / "curve.png").stat().st_size > 0


def test_drawn_books_agree_with_each_other(config):
  heartbeats = draw_heartbeats(config, 16)

  assert heartbeats == draw_heartbeats(config, 16)
  lent, held = collections.Counter(), collections.Counter()
  for instance, heartbeat in enumerate(heartbeats):
    assert heartbeat.counts.is_conserved()
    assert heartbeat.counts.total == 1000
    for debtor, count in heartbeat.lent:
      lent[debtor, instance] += count
    for blocks in heartbeat.requests:
      for holder, count in blocks.holders:
        if holder != instance:
          held[instance, holder] += count
  assert lent == held
  assert lent
