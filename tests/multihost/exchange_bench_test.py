"""`exchange_bench` with a process for each instance."""

import json
import subprocess
import sys

import pytest

from experiments.run import config_fields
from tests.experiments.small_exchange_bench import small_config

pytestmark = pytest.mark.multihost


def test_rblocks_go_from_process_to_process(tmp_path):
  fields = config_fields(small_config())
  ended = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.launch.local",
      "--num_processes=2",
      "--",
      "--config=configs/exchange_bench.py",
      f"--workdir={tmp_path}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
  )
  assert ended.returncode == 0, ended.stdout
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["correct"]
  *moved, beside = result["rows"]
  assert [row["correct"] for row in moved] == [True] * 4
  assert len(beside["shares"]) == 2
  assert {row["num_processes"] for row in result["rows"]} == {2}
