"""A place in a folder where processes wait for each other."""

import pathlib
import time
from collections.abc import Callable

from infinite_llm.errors import GroupError

_POLL_S = 0.002


class FileBarrier:
  """Each process leaves an empty file where it is, and looks for the others'.

  Nothing is ever removed, so each meeting needs a name of its own, and each run
  a folder of its own.
  """

  def __init__(
    self, folder: pathlib.Path, number: int, count: int, patience_s: float
  ):
    """Meets nobody yet.

    Args:
      folder: The same for all processes; it exists.
      number: Of this process, in `[0, count)`.
      count: How many there are.
      patience_s: How long to wait for the others.
    """
    self._folder = folder
    self._number = number
    self._count = count
    self._patience_s = patience_s
    self._arrived_s: dict[str, float] = {}

  def arrive(self, name: str) -> None:
    """Says that this process is there; more than once is as good as once."""
    if name not in self._arrived_s:
      self._arrived_s[name] = time.monotonic()
      self._file(name, self._number).touch()

  def is_complete(self, name: str) -> bool:
    """Whether all are there.

    Raises:
      GroupError: If this process has waited for too long, naming who lacks.
    """
    missing = [
      n for n in range(self._count) if not self._file(name, n).exists()
    ]
    arrived_s = self._arrived_s.get(name, time.monotonic())
    if missing and time.monotonic() - arrived_s > self._patience_s:
      raise GroupError(
        f"All {self._count} processes must come to {name!r} within"
        f" {self._patience_s:g} s of each other; {', '.join(map(str, missing))}"
        " did not."
      )
    return not missing

  def meet(
    self, name: str, meanwhile: Callable[[], object] | None = None
  ) -> None:
    """Blocks until all are there.

    Args:
      name: Of the meeting.
      meanwhile: Called again and again; None pauses.

    Raises:
      GroupError: If that takes too long, naming who lacks.
    """
    self.arrive(name)
    while not self.is_complete(name):
      if meanwhile is not None:
        meanwhile()
      else:
        time.sleep(_POLL_S)

  def _file(self, name: str, number: int) -> pathlib.Path:
    return self._folder / f"{name}.{number}"
