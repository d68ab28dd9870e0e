"""The fault simulation as an experiment: its output and exit status."""

import json
import shlex

import pytest

from experiments import run
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.fault_points import Mishap


def _call(workdir, *args):
  return run.main(
    [
      "run",
      "--config=configs/fault_simulation.py",
      f"--workdir={workdir}",
      *args,
    ]
  )


def _result(workdir):
  return json.loads((workdir / "result.json").read_text())


@pytest.fixture
def bug(monkeypatch):
  """A refusal is counted as a loan."""
  count_lent = Creditor._count_lent
  monkeypatch.setattr(
    Creditor,
    "_count_lent",
    lambda self, owner, change: count_lent(self, owner, change or 1),
  )


def test_a_clean_run_says_what_happened(tmp_path, capsys):
  assert _call(tmp_path, "--config.num_seeds=3") == 0

  result = _result(tmp_path)
  assert (result["num_seeds"], result["num_violations"]) == (3, 0)
  assert result["fewest_of_a_seed"]["num_delivered"] >= 300
  assert result["fewest_of_a_seed"]["num_faults"] >= 5
  printed = capsys.readouterr().out
  assert "3 seeds, " in printed
  assert "faults: " in printed
  assert " crash " in printed
  assert "violations: 0" in printed


def test_larger_clusters_have_every_kind_of_fault(tmp_path):
  args = ("--config.num_seeds=13", "--config.num_instances=12")
  assert _call(tmp_path, *args, "--config.min_messages=8000") == 0

  result = _result(tmp_path)
  assert result["totals"]["num_delivered"] >= 13 * 8000
  assert set(Mishap) | {"payload lost", "payload repeated", "skew"} <= set(
    result["faults"]
  )
  assert result["totals"]["num_swapped"] > 0
  assert result["plans_followed"]["MoveKvcache"] > 0


def test_a_violation_is_an_error_with_a_command_that_replays_it(
  tmp_path, capsys, bug
):
  assert _call(tmp_path, "--config.num_seeds=12", "--config.min_faults=6") == 1

  violation = _result(tmp_path)["violations"][0]
  assert "says that it lent" in violation["violation"]
  assert f"seed {violation['seed']}: " in capsys.readouterr().out

  command = shlex.split(violation["replay"])
  assert command[:3] == ["python", "-m", "experiments.run"]
  replay = tmp_path / "replay"
  assert run.main(["run", *command[3:], f"--workdir={replay}"]) == 1
  assert _result(replay)["violation"] == violation["violation"]
  trace = (replay / "trace.txt").read_text().splitlines()
  assert violation["violation"] in trace[-1]
  assert any(" sent " in line and "Heartbeat" in line for line in trace)


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.num_seeds=0", "num_seeds must be at least 1; got 0."),
    ("--config.num_instances=1", "must be 0 or at least 2; got 1."),
    ("--config.min_faults=0", "min_faults must be at least 1; got 0."),
  ],
)
def test_impossible_numbers_are_refused(tmp_path, capsys, flag, words):
  assert _call(tmp_path, flag) == 2
  assert words in capsys.readouterr().err
