"""The soak, for some seconds."""

import json

import pytest

from experiments import run
from experiments.soak import Sample, growth_mib

_SMALL = (
  "--config.show_progress=False",
  "--config.duration_s=10",
  "--config.sample_every_s=0.5",
  "--config.max_growth_mib=512",
  "--config.requests.max_tokens=1500",
  "--config.requests.aborted=0.5",
)


def _call(workdir, *args) -> int:
  return run.main(
    ["run", "--config=configs/soak.py", f"--workdir={workdir}", *args]
  )


def _sample(time_s: float, resident_mib: float) -> Sample:
  return Sample(
    time_s=time_s,
    resident_mib=resident_mib,
    num_objects=0,
    num_arrays=0,
    num_finished=0,
  )


def test_growth_is_from_the_second_fifth_to_the_last():
  # Fifths of 100 s: 10 | 20, 22, 24 | | | 30, 31, 90; then the end.
  samples = [
    _sample(0, 10),
    _sample(20, 20),
    _sample(30, 24),
    _sample(39, 22),
    _sample(50, 500),
    _sample(80, 30),
    _sample(90, 90),
    _sample(99, 31),
    _sample(101, 1000),
  ]
  assert growth_mib(samples, 100) == 31 - 22


def test_the_sampling_must_be_fine_enough(tmp_path, capsys):
  assert _call(tmp_path, *_SMALL, "--config.sample_every_s=2") == 2
  assert "sample_every_s must be in (0, 1.0]" in capsys.readouterr().err


@pytest.mark.bench
def test_the_longest_prompt_must_have_room(tmp_path, capsys):
  args = (*_SMALL, "--config.requests.max_tokens=9000")
  assert _call(tmp_path, *args) == 2
  message = "requests.max_tokens must be what a request can have; got 9000"
  assert message in capsys.readouterr().err


@pytest.mark.bench
def test_requests_of_all_lengths_leave_nothing_behind(tmp_path):
  assert _call(tmp_path, *_SMALL) == 0
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["correct"]
  assert result["num_finished"] > 0
  assert result["num_aborted"] > 0
  assert result["blocks_moved"] > 0
  assert result["num_compiled"] == 0
  assert result["blocks_leaked"] == 0
  assert [sample["time_s"] for sample in result["samples"]] == sorted(
    sample["time_s"] for sample in result["samples"]
  )


@pytest.mark.bench
def test_growth_beyond_the_limit_fails_the_run(tmp_path):
  args = (*_SMALL, "--config.max_growth_mib=-100000")
  assert _call(tmp_path, *args) == 1
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["correct"]
  assert not result["memory_correct"]
