import pytest

from configs.cluster_simulation import get_config
from experiments import cluster_simulation
from infinite_llm.errors import ConfigError


@pytest.fixture
def config():
  config = get_config()
  config.policies = ("borrow", "static", "static-on-2")
  config.cluster.num_instances = 2
  config.cluster.host_blocks = 0
  config.cluster.num_blocks = 41  # 10,240 tokens.
  config.lending.headroom_blocks = 1
  config.trace.min_tokens = (1_000, 1_000)
  config.trace.max_tokens = (4_000, 16_000)
  config.trace.tokens_per_s = 30_000.0
  config.trace.arrive_s = 4.0
  config.large.num_instances = 3
  config.large.max_tokens = 4_000
  config.large.tokens_per_s = 30_000.0
  config.large.arrive_s = 1.0
  return config


def test_every_policy_runs_every_trace(config, tmp_path):
  result = cluster_simulation.run(config, tmp_path)

  runs = {(row["trace"], row["policy"]): row for row in result["runs"]}
  assert list(runs) == [
    ("1-4K", "borrow"),
    ("1-4K", "static"),
    ("1-4K", "static-on-2"),
    ("1-16K", "borrow"),
    ("1-16K", "static"),
    ("1-16K", "static-on-2"),
  ]
  assert result["correct"]
  assert result["pool_tokens"] == 10_240
  # Only sharing serves what is longer than a pool, or a larger pool.
  assert runs["1-16K", "static-on-2"]["num_refused"] == 0
  assert runs["1-16K", "static"]["num_refused"] > 0
  assert runs["1-16K", "static"]["longest_context_tokens"] <= 10_240
  assert runs["1-16K", "borrow"]["num_refused"] == 0
  assert runs["1-16K", "borrow"]["longest_context_tokens"] > 10_240
  for row in (*runs.values(), result["large"]):
    unserved = row["num_refused"] + row["num_failed"]
    assert row["num_finished"] == row["num_requests"] - unserved
  assert result["large"]["num_instances"] == 3
  assert (tmp_path / "policies.png").stat().st_size > 0


def test_a_trace_file_takes_the_place_of_drawn_ones(config, tmp_path):
  path = tmp_path / "mine.csv"
  path.write_text("arrival_s,prompt_tokens,output_tokens\n0,3000,4\n1,50,2\n")
  config.trace.path = str(path)
  config.policies = ("static",)
  config.large.num_instances = 0

  result = cluster_simulation.run(config, tmp_path)

  (row,) = result["runs"]
  assert row["trace"] == "mine.csv"
  assert row["num_finished"] == 2
  assert row["longest_context_tokens"] == 3004
  assert result["large"] is None


@pytest.mark.parametrize("policy", ["static-on-3", "static-on-0", "static-2"])
def test_impossible_policies_are_refused(config, tmp_path, policy):
  config.policies = (policy,)

  with pytest.raises(ConfigError, match=f"policies .* got '{policy}'"):
    cluster_simulation.run(config, tmp_path)
