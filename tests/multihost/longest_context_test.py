"""`longest_context` in two processes, which compute the same."""

import json
import os
import subprocess
import sys

import pytest

from experiments.run import config_fields
from infinite_llm.distributed.group_end import BROKEN_GROUP
from tests.experiments.small_longest_context import small_config
from tests.multihost.group_test import free_port
from tests.multihost.launched import launch

pytestmark = pytest.mark.multihost

_TIMEOUT_S = 300

# Another machine has less memory, which only its process can know.
_WITHOUT_MEMORY = """
import sys
from experiments import longest_context, run
from infinite_llm.cache.host_memory import HostMemory
longest_context.host_memory = lambda *_: HostMemory(
  available_bytes=0, pinned_limit_bytes=None
)
sys.exit(run.main(["experiments.run", *sys.argv[1:]]))
"""


def flags(workdir, ranks):
  fields = config_fields(small_config()) | {"cluster.tensor_parallel": ranks}
  return [
    "--config=configs/longest_context.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def run(num_processes, workdir, ranks):
  """Runs it to its end; gives what it printed."""
  # For a process that is alone; a group knows what it takes.
  environment = {"JAX_NUM_CPU_DEVICES": str(2 * ranks)}
  return launch(num_processes, *flags(workdir, ranks), environment=environment)


@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_those_of_a_single_process(ranks, tmp_path):
  run(1, tmp_path / "one", ranks)
  output = run(2, tmp_path / "two", ranks)

  one, two = (
    json.loads((tmp_path / name / "result.json").read_text())
    for name in ("one", "two")
  )
  assert one["correct"]
  assert two["correct"]
  assert two["run"]["device"]["count"] == 2 * ranks
  rows = two["rows"]
  assert json.loads((tmp_path / "two" / "rows.json").read_text()) == rows
  assert [row["length"] for row in rows] == [32, 64, 160]
  assert [row["tokens_in_hbm"] for row in rows] == [32, 64, 32]
  assert {row["num_processes"] for row in rows} == {2}
  for row, alone in zip(rows, one["rows"], strict=True):
    assert row["next_token"] == alone["next_token"]
    assert row["largest_logit"] == pytest.approx(
      alone["largest_logit"], rel=1e-5
    )
  # Each length has other logits, or nothing would be compared.
  assert len({row["largest_logit"] for row in rows}) == 3
  # Process 0 alone says how far it is.
  assert output.count("160 tokens: slab 2 of 2 in host memory") == 1


def test_a_member_that_refuses_ends_the_group(tmp_path):
  port = free_port()
  starts = (["-m", "experiments.run"], ["-c", _WITHOUT_MEMORY])
  processes = [
    subprocess.Popen(
      [sys.executable, *start, *flags(tmp_path, 1)],
      env={
        **os.environ,
        "INFINITE_LLM_PROCESS": str(n),
        "INFINITE_LLM_NUM_PROCESSES": "2",
        "INFINITE_LLM_COORDINATOR": f"127.0.0.1:{port}",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for n, start in enumerate(starts)
  ]
  try:
    texts = [each.communicate(timeout=_TIMEOUT_S)[0] for each in processes]
  finally:
    for each in processes:
      each.kill()

  leader, member = (each.returncode for each in processes)
  assert member == 2, texts[1]
  assert "lengths must fit in the host memory that is available" in texts[1]
  assert leader == BROKEN_GROUP, texts[0]
  assert not (tmp_path / "result.json").exists()
