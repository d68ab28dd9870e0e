"""Runs an experiment in several processes of this machine.

    python -m experiments.launch.local --num_processes=4 --
      --config=configs/quickstart.py

What follows `--` is the command line of `experiments.run`, the same for all
processes. Each has an equal share of `config.cluster.num_instances`, and on the
platform "gpu" as many GPUs as its instances take, of CUDA_VISIBLE_DEVICES where
that is set. When one of them dies, by a signal or because it hangs, the others
end too, since they are one JAX job; the launcher then starts the group again
without it and its GPUs, up to `--max_restarts` times: with fewer processes, and
as many fewer instances. An experiment that keeps a journal in its workdir goes
on where it was. The exit status is that of process 0; once that has ended well,
all is done.
"""

import dataclasses
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from absl import flags

from experiments.child_processes import deferring_signals, ending_on_sigterm
from experiments.launch.command import (
  Command,
  asks_for_help,
  help_text,
  launcher_flags,
  parse_flags,
  split_command,
)
from infinite_llm.distributed.group_end import BROKEN_GROUP
from infinite_llm.errors import ConfigError

_POLL_S = 0.05
_END_S = 20.0
"""How long processes may take to notice that their group is broken."""


def main(argv: Sequence[str]) -> int:
  """Runs the group.

  Args:
    argv: The command line, program name first.

  Returns:
    The exit status.
  """
  if asks_for_help(argv):
    print(help_text(__doc__, _flags()))
    return 0
  try:
    own, command = split_command(argv)
    values = parse_flags(own, _flags())
    if values.dry_run:
      _print_plan(values.num_processes, command)
      return 0
    with ending_on_sigterm():
      return _run(values, command)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _flags() -> flags.FlagValues:
  values = launcher_flags()
  flags.DEFINE_integer(
    "max_restarts",
    0,
    "How often the group is started again without processes that died.",
    lower_bound=0,
    flag_values=values,
  )
  return values


def _run(values: flags.FlagValues, command: Command) -> int:
  """Runs the group, again and again while processes die."""
  num_processes = values.num_processes
  share = command.instances_per_process(num_processes)
  gpus = _gpus(num_processes, share, command)
  for restarts in range(values.max_restarts + 1):
    args = command.args
    if restarts:
      args = (*args, f"--config.cluster.num_instances={share * num_processes}")
    ends = _run_once(num_processes, args, gpus)
    status, dead = ends.statuses[0], ends.dead()
    num_left = num_processes - len(dead)
    if (
      not status or not dead or not num_left or restarts == values.max_restarts
    ):
      return status if status >= 0 else 128 - status
    gpus = [each for n, each in enumerate(gpus) if n not in dead]
    print(
      f"Process(es) {', '.join(map(str, dead))} died; starting again with"
      f" {num_left}.",
      file=sys.stderr,
      flush=True,
    )
    num_processes = num_left
  raise AssertionError("unreachable")


def process_gpus(num_processes: int, each: int) -> list[str]:
  """CUDA_VISIBLE_DEVICES of each process of this machine.

  Args:
    num_processes: How many there are.
    each: GPUs of each.

  Raises:
    ConfigError: If CUDA_VISIBLE_DEVICES of the launcher names too few.
  """
  needed = num_processes * each
  named = os.environ.get("CUDA_VISIBLE_DEVICES")
  gpus = list(map(str, range(needed))) if named is None else named.split(",")
  if len(gpus) < needed:
    raise ConfigError(
      f"CUDA_VISIBLE_DEVICES must name at least {needed} GPUs, {each} for each"
      f" process; got {named!r}."
    )
  return [",".join(gpus[n * each :][:each]) for n in range(num_processes)]


def _gpus(num_processes: int, share: int, command: Command) -> list[str]:
  """CUDA_VISIBLE_DEVICES of each process; empty on other platforms."""
  if command.platform != "gpu":
    return []
  return process_gpus(num_processes, share * command.tensor_parallel)


@dataclasses.dataclass(frozen=True)
class _Ends:
  """How the processes of a group ended.

  Attributes:
    statuses: Exit status of each, as of `subprocess`; `BROKEN_GROUP` for one
      that this launcher had to kill.
    first: Statuses of those that were seen first not to end well.
    hung: Those that this launcher had to kill.
  """

  statuses: Sequence[int]
  first: Mapping[int, int]
  hung: Sequence[int]

  def dead(self) -> list[int]:
    """Processes that the group ended for, by a signal or since they hung.

    JAX aborts the others when one is gone: an abort counts for who was first,
    before anybody gave up.
    """
    gave_up = BROKEN_GROUP in self.first.values()
    aborted = () if gave_up else self.first
    killed = [
      n
      for n, status in enumerate(self.statuses)
      if status < 0 and (-status != signal.SIGABRT or n in aborted)
    ]
    # They may have given up for one that no longer answers.
    return list(self.hung) if gave_up and not killed else killed


def _run_once(
  num_processes: int, args: Sequence[str], gpus: Sequence[str]
) -> _Ends:
  """Starts a group and waits for all of it."""
  port = _free_port()
  secret = secrets.token_hex(16)
  processes: list[subprocess.Popen] = []
  deadline_s = None
  first: dict[int, int] = {}
  try:
    with deferring_signals():
      for n in range(num_processes):
        environment = {
          **os.environ,
          **_environment(n, num_processes, port, gpus),
          "INFINITE_LLM_SECRET": secret,
        }
        process = subprocess.Popen(_process_command(args), env=environment)
        processes.append(process)
    while any(process.poll() is None for process in processes):
      time.sleep(_POLL_S)
      # Those that are left notice it themselves; this is for one that hangs.
      if not first:
        first = {n: p.returncode for n, p in enumerate(processes) if p.poll()}
        deadline_s = time.monotonic() + _END_S if first else None
      if deadline_s is not None and time.monotonic() > deadline_s:
        break
  finally:
    with deferring_signals():
      hanging = [n for n, p in enumerate(processes) if p.poll() is None]
      for n in hanging:
        processes[n].kill()
      for process in processes:
        process.wait()
  if not first:  # All ended between two looks.
    first = {n: p.returncode for n, p in enumerate(processes) if p.returncode}
  statuses = [
    BROKEN_GROUP if n in hanging else process.returncode
    for n, process in enumerate(processes)
  ]
  return _Ends(statuses, first, hanging)


def _environment(
  n: int, num_processes: int, port: int, gpus: Sequence[str]
) -> dict[str, str]:
  visible = {"CUDA_VISIBLE_DEVICES": gpus[n]} if gpus else {}
  if num_processes == 1:
    return visible
  return {
    **visible,
    "INFINITE_LLM_PROCESS": str(n),
    "INFINITE_LLM_NUM_PROCESSES": str(num_processes),
    "INFINITE_LLM_COORDINATOR": f"127.0.0.1:{port}",
  }


def _process_command(args: Sequence[str]) -> list[str]:
  return [sys.executable, "-m", "experiments.run", *args]


def _print_plan(num_processes: int, command: Command) -> None:
  share = command.instances_per_process(num_processes)
  gpus = _gpus(num_processes, share, command)
  for n in range(num_processes):
    environment = _environment(n, num_processes, 12345, gpus)
    shown = [f"{name}={value}" for name, value in environment.items()]
    print(*shown, shlex.join(_process_command(command.args)))


def _free_port() -> int:
  """A port that is free, as is the one after it."""
  while True:
    with socket.socket() as first, socket.socket() as second:
      first.bind(("127.0.0.1", 0))
      port = first.getsockname()[1]
      try:
        second.bind(("127.0.0.1", port + 1))
      except OSError:
        continue
      return port


if __name__ == "__main__":
  sys.exit(main(sys.argv))
