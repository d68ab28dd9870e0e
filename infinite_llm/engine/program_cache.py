"""Compiled programs by name and shape, and a count of late compilations."""

import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from absl import logging


class ProgramCache:
  """Compiles each program once; warns when that happens while serving.

  Attributes:
    num_late_compiles: Programs compiled after `close_warm_up`.
  """

  def __init__(self):
    self._compiled: dict[Hashable, Any] = {}
    self._is_warm = False
    self.num_late_compiles = 0

  def __len__(self) -> int:
    return len(self._compiled)

  def __iter__(self) -> Iterator[Hashable]:
    """Keys of the compiled programs."""
    return iter(self._compiled)

  def compiled(self) -> Iterator[Any]:
    """The compiled programs themselves."""
    return iter(self._compiled.values())

  def close_warm_up(self) -> None:
    """From now on a compilation is one too many: logged and counted."""
    self._is_warm = True

  def run(
    self, key: Hashable, build: Callable[[], Any], args: tuple[Any, ...]
  ) -> Any:
    """Runs a program, compiling it first if it is new.

    Args:
      key: Name, instance and shape; equal keys mean equal programs.
      build: Makes the jitted function.
      args: Its arguments; donated ones are consumed.

    Returns:
      What the program returns, still being computed.
    """
    if key not in self._compiled:
      start = time.perf_counter()
      self._compiled[key] = build().lower(*args).compile()
      if self._is_warm:
        self.num_late_compiles += 1
        logging.warning(
          "Compiled %s while serving, in %.1f s: its shape was not part of the"
          " warm-up.",
          key,
          time.perf_counter() - start,
        )
    return self._compiled[key](*args)
