"""The soak in two processes, for some seconds."""

import json

import pytest

from tests.multihost.launched import launch

pytestmark = pytest.mark.multihost


def test_nothing_is_left_in_either_tier_of_any_process(tmp_path):
  """Requests of both processes lend, are swapped to host memory and aborted."""
  launch(
    2,
    "--config=configs/soak.py",
    f"--workdir={tmp_path}",
    "--config.show_progress=False",
    "--config.cluster.num_instances=2",
    "--config.duration_s=6",
    "--config.sample_every_s=0.5",
    "--config.max_growth_mib=512",
    "--config.requests.num_in_flight=12",
    "--config.requests.max_tokens=700",
    "--config.requests.max_more_tokens=256",
    "--config.requests.aborted=0.3",
    "--config.cache.num_blocks=17",
    "--config.cache.host_blocks=17",
    "--config.cache.verify_moves=True",
  )
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["correct"]
  assert result["num_processes"] == result["num_instances"] == 2
  assert result["sampled_process"] == 0
  assert result["num_finished"] > 0
  assert result["blocks_moved"] > 0
  assert result["peak_host_blocks"] > 0
  assert result["num_compiled"] == result["late_compiles"] == 0
  assert result["blocks_leaked"] == result["host_blocks_leaked"] == 0
