"""A batch of requests, answered by real processes of this machine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_REQUESTS = 18
_TIMEOUT_S = 600

# Four instances of 15 rBlocks, 480 tokens each.
_FLAGS = (
  "--config=configs/batch.py",
  "--config.show_progress=False",
  "--config.cluster.num_instances=4",
  "--config.model.dtype=float32",
  "--config.cache.block_size=32",
  "--config.cache.num_blocks=16",
  "--config.lending.headroom_blocks=2",
  "--config.lending.spill_slots=2",
  "--config.lending.exchange_blocks=4",
  "--config.lending.group_prefill_buckets=(128,)",
  "--config.scheduler.max_num_seqs=4",
  "--config.scheduler.decode_buckets=(4,)",
  "--config.scheduler.prefill_buckets=(128,)",
  "--config.scheduler.prefill_rows=2",
)


def write_requests(path: pathlib.Path, most_tokens: int = 900) -> None:
  """Writes requests, every sixth of which needs more than an instance has."""
  sizes = [
    (most_tokens - n if n % 6 == 0 else 20 + 13 * n, 24 + n)
    for n in range(NUM_REQUESTS)
  ]
  write_requests_of(path, sizes)


def write_requests_of(
  path: pathlib.Path, sizes: Sequence[tuple[int, int]]
) -> None:
  """Writes requests of `(prompt, output)` tokens."""
  rng = np.random.default_rng(0)
  lines = []
  for n, (length, max_tokens) in enumerate(sizes):
    line = {
      "prompt": rng.integers(3, 200, length).tolist(),
      "max_tokens": max_tokens,
      "ignore_eos": True,
      "temperature": 0.8 * (n % 2),
    }
    lines.append(json.dumps(line) + "\n")
  path.write_text("".join(lines), encoding="utf-8")


class BatchJob:
  """One batch, in a folder of its own.

  Attributes:
    workdir: The folder.
    requests: The file of requests.
  """

  def __init__(self, workdir: pathlib.Path, requests: pathlib.Path):
    """Prepares it.

    Args:
      workdir: Its folder, made if need be.
      requests: The file of requests.
    """
    self.workdir = workdir
    self.requests = requests
    workdir.mkdir(exist_ok=True)
    self._flags = (
      *_FLAGS,
      f"--workdir={workdir}",
      f"--config.requests.path={requests}",
    )
    self._log = workdir / "log.txt"

  def start(
    self, num_processes: int, *flags: str, max_restarts: int = 0
  ) -> subprocess.Popen:
    """Starts the launcher."""
    with self._log.open("wb") as log:
      return subprocess.Popen(
        [
          sys.executable,
          "-m",
          "experiments.launch.local",
          f"--num_processes={num_processes}",
          f"--max_restarts={max_restarts}",
          "--",
          *self._flags,
          *flags,
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def run(self, num_processes: int, *flags: str) -> Mapping[str, object]:
    """Runs it to its end; gives its result."""
    status = self.start(num_processes, *flags).wait(_TIMEOUT_S)
    assert status == 0, self.log()
    return self.result()

  def start_alone(
    self,
    process: int,
    port: int,
    *flags: str,
    timeout_s: int = 60,
    program: Sequence[str] = ("-m", "experiments.run"),
  ) -> subprocess.Popen:
    """Starts one process of a group of two, without a launcher."""
    return subprocess.Popen(
      [sys.executable, *program, *self._flags, *flags],
      env={
        **os.environ,
        "INFINITE_LLM_PROCESS": str(process),
        "INFINITE_LLM_NUM_PROCESSES": "2",
        "INFINITE_LLM_COORDINATOR": f"127.0.0.1:{port}",
        "INFINITE_LLM_START_TIMEOUT_S": str(timeout_s),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def result(self) -> Mapping[str, Any]:
    """What `result.json` holds."""
    return json.loads((self.workdir / "result.json").read_text())

  def answers(self) -> Sequence[Sequence[int]]:
    """Tokens of all requests, in order."""
    lines = (self.workdir / "outputs.jsonl").read_text().splitlines()
    return [json.loads(line)["token_ids"] for line in lines]

  def log(self) -> str:
    """What all processes printed."""
    return self._log.read_text(errors="replace")

  def num_ended(self) -> int:
    """Requests that ended, by the journal."""
    journal = self.workdir / "journal.jsonl"
    if not journal.exists():
      return 0
    return sum(
      line.startswith(b'{"ended"') for line in journal.read_bytes().splitlines()
    )

  def kill(self, launcher: subprocess.Popen, process: int) -> float:
    """Kills a process by signal 9, once some requests have ended.

    Returns:
      Seconds until all the others had ended too.
    """
    deadline_s = time.monotonic() + _TIMEOUT_S
    while self.num_ended() < 3:
      assert launcher.poll() is None, self.log()
      assert time.monotonic() < deadline_s
      time.sleep(0.01)
    pids = _children(launcher.pid)
    os.kill(pids.pop(process), signal.SIGKILL)
    start_s = time.monotonic()
    while any(_is_running(pid) for pid in pids.values()):
      assert time.monotonic() < deadline_s
      time.sleep(0.01)
    return time.monotonic() - start_s


def _children(launcher: int) -> dict[int, int]:
  """Process ids of a launcher's processes, by their numbers."""
  found = {}
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      parent = int(_stat(folder)[1])
      environment = (folder / "environ").read_bytes().split(b"\0")
    except (OSError, IndexError):
      continue
    for name, _, value in (each.partition(b"=") for each in environment):
      if parent == launcher and name == b"INFINITE_LLM_PROCESS":
        found[int(value)] = int(folder.name)
  return found


def _is_running(pid: int) -> bool:
  try:
    return _stat(pathlib.Path("/proc") / str(pid))[0] != "Z"
  except OSError:
    return False


def _stat(folder: pathlib.Path) -> list[str]:
  """State and parent of a process, and more."""
  return (folder / "stat").read_text().rpartition(")")[2].split()
