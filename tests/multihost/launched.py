"""An experiment in real processes of this machine, run to its end."""

import os
import subprocess
import sys
from collections.abc import Mapping

_TIMEOUT_S = 300


def launch(
  num_processes: int, *flags: str, environment: Mapping[str, str] | None = None
) -> str:
  """Starts the local launcher, and waits until all went well.

  Args:
    num_processes: How many.
    flags: Of the experiment.
    environment: Variables beside those of this process.

  Returns:
    What all of them printed.
  """
  ended = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.launch.local",
      f"--num_processes={num_processes}",
      "--",
      *flags,
    ],
    env={**os.environ, **(environment or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=_TIMEOUT_S,
  )
  assert ended.returncode == 0, ended.stdout
  return ended.stdout
