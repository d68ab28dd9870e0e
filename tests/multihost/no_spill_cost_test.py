"""`no_spill_cost` with a process for each instance."""

import json
import subprocess
import sys

import pytest

from experiments.run import config_fields
from tests.experiments.small_no_spill_cost import small_config

pytestmark = pytest.mark.multihost

_TIMEOUT_S = 600
# It must leave the devices to the processes that it starts.
_RUN = """
import sys
from experiments import run
from jax._src import xla_bridge
status = run.main(["experiments.run", *sys.argv[1:]])
assert not xla_bridge.backends_are_initialized()
sys.exit(status)
"""


def start(workdir, *flags: str) -> subprocess.CompletedProcess[str]:
  """Runs it in small, on two processes."""
  fields = config_fields(small_config())
  return subprocess.run(
    [
      sys.executable,
      "-c",
      _RUN,
      "--config=configs/no_spill_cost.py",
      f"--workdir={workdir}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
      "--config.cluster.num_processes=2",
      *flags,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=_TIMEOUT_S,
  )


def test_each_instance_has_a_process(tmp_path):
  ended = start(tmp_path)

  assert ended.returncode == 0, ended.stdout
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["faults"] == []
  assert result["correct"]
  cases = ("separate", "sharing", "spilling, prefill", "spilling, decode")
  rows = result["rows"]
  assert [(row["case"], row["instance"]) for row in rows] == [
    (case, instance) for case in cases for instance in (0, 1)
  ]
  for row in rows:
    assert row["device"] == "cpu"
    if "owner" not in row or row["instance"] == 1:
      assert row["steps"] > 0
      assert row["output_tokens_per_s"] > 0
  pairs = [(ratio["case"], ratio["to"]) for ratio in result["ratios"]]
  assert pairs == [
    (case, to)
    for case, to in (
      ("sharing", "separate"),
      ("spilling, prefill", "sharing"),
      ("spilling, decode", "sharing"),
    )
    for _ in (0, 1)
  ]
  # In float32 the answers of all cases are the same.
  assert result["answers_compared"] > 0
  assert result["answers_different"] == 0
  assert result["launches"]["sharing"].keys() & {"group_decode"} == set()
  assert result["launches"]["spilling, decode"]["group_decode"] > 0
  written = json.loads((tmp_path / "rows.json").read_text())
  assert written == {"rows": rows, "ratios": result["ratios"]}
  assert result["run"]["device"]["count"] == 2
  for line in ("separate-1: warm-up begins", "sharing: sharing took "):
    assert line in ended.stdout


def test_a_process_that_fails_is_named_and_ends_the_others(tmp_path):
  # A folder where a process wants to write a file.
  (tmp_path / "separate-1" / "part.new").mkdir(parents=True)

  ended = start(tmp_path, "--config.cases=('separate',)")

  assert ended.returncode == 75, ended.stdout
  assert "Process 'separate-1' ended with status" in ended.stdout
  assert "Is a directory" in ended.stdout
