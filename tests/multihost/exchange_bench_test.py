"""`exchange_bench` with a process for each instance."""

import json

import pytest

from experiments.run import config_fields
from tests.experiments.small_exchange_bench import small_config
from tests.multihost.launched import launch

pytestmark = pytest.mark.multihost


def test_rblocks_go_from_process_to_process_bit_for_bit(tmp_path):
  """Each compares what it received with what the other one drew."""
  fields = config_fields(small_config())
  launch(
    2,
    "--config=configs/exchange_bench.py",
    f"--workdir={tmp_path}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  )
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["correct"]
  *moved, beside = result["rows"]
  assert len(moved) == 4
  assert [row["correct"] for row in result["rows"]] == [True] * 5
  assert len(beside["shares"]) == 2
  assert {row["num_processes"] for row in result["rows"]} == {2}
