"""The main job in four processes, an instance each."""

import json

import pytest

from tests.multihost.launched import launch

pytestmark = pytest.mark.multihost


def test_a_document_in_four_processes_is_answered_from(tmp_path):
  launch(
    4,
    "--config=configs/quickstart.py",
    f"--workdir={tmp_path}",
    "--config.show_progress=False",
    "--config.document.num_tokens=1500",
    "--config.document.num_needles=3",
    "--config.short_requests.num_tokens=64",
    "--config.cache.block_size=16",
    "--config.lending.headroom_blocks=8",
    "--config.lending.group_prefill_buckets=(128,)",
    "--config.scheduler.prefill_buckets=(128,)",
  )
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["answer"] == result["expected"]
  assert len(result["expected"]) == 3
  assert result["context_tokens"] > 2 * result["capacity_tokens_per_instance"]
  assert len(result["creditors"]) >= 2
  assert result["num_short_requests"] >= 3
  assert result["short_requests_right"] == result["num_short_requests"]
  # Each process has had requests of its own.
  assert [each["requests"] > 0 for each in result["instances"]] == [True] * 4
  assert result["run"]["device"]["count"] == 4
  assert result["blocks_leaked"] == result["late_compiles"] == 0
  assert (tmp_path / "rblocks.png").stat().st_size > 10_000
