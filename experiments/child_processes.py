"""Processes that an experiment starts, and that end with it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Self

from infinite_llm.errors import GroupError

_POLL_S = 0.2
_TAIL_LINES = 30


class ChildProcesses:
  """Processes that end together: all well, or all of them.

  Use it in a `with` statement; who still runs behind it is killed.
  """

  def __init__(self):
    """Has none yet."""
    self._children: dict[str, tuple[subprocess.Popen, pathlib.Path]] = {}

  def start(
    self,
    name: str,
    args: Sequence[str],
    log: pathlib.Path,
    environment: Mapping[str, str] | None = None,
  ) -> None:
    """Starts a process, and whatever that starts.

    Args:
      name: What errors call it.
      args: Its command line behind the interpreter.
      log: Gets all that it prints.
      environment: Variables beside those of this process.
    """
    with log.open("wb") as file:
      process = subprocess.Popen(
        [sys.executable, *args],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        process_group=0,  # So that its own processes can be ended with it.
      )
    self._children[name] = process, log

  def wait(self, look: Callable[[], None]) -> None:
    """Blocks until all have ended well.

    Args:
      look: Called again and again meanwhile, and once more afterwards.

    Raises:
      GroupError: If one fails, with what it said last.
    """
    while True:
      statuses = {
        name: process.poll() for name, (process, _) in self._children.items()
      }
      look()
      for name, status in statuses.items():
        if status:
          _, log = self._children[name]
          raise GroupError(
            f"Process {name!r} ended with status {status}. The end of {log}:\n"
            f"{_tail(log)}"
          )
      if None not in statuses.values():
        return
      time.sleep(_POLL_S)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for process, _log in self._children.values():
      # Also behind one that has ended: those that it started may be left.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
  """Has a SIGTERM, as of a time limit, leave `with` statements in order.

  For the main thread.
  """

  def leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)

  before = signal.signal(signal.SIGTERM, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
  """Has SIGTERM and SIGINT wait until the block is over.

  A signal that comes while a process is started would else leave behind a
  process that nobody knows of. Only handlers wait: what is started meanwhile
  has the signals as ever, where it would inherit a mask. For the main thread.
  """
  came: list[int] = []
  before = {
    number: signal.signal(number, lambda number, _: came.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(number) != signal.SIG_IGN  # That is inherited.
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    if came:
      signal.raise_signal(came[0])


def _tail(log: pathlib.Path) -> str:
  lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
  return "\n".join(lines[-_TAIL_LINES:])
