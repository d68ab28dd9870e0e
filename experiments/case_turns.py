"""Whose turn it is, where separate and sharing engines have the same devices.

Devices and hosts get slower and faster by more than what is to be measured, so
that cases which are compared take turns: a repeat of the one, a repeat of the
other. Who waits has its engine loaded, and does nothing.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import ml_collections

from experiments.file_barrier import FileBarrier

SEPARATE = "separate"
SHARING = "sharing"
_ORDER = (SEPARATE, SHARING)


class CaseTurns:
  """One process's view of the turns of all."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    case: str,
    number: int = 0,
    meanwhile: Callable[[], object] | None = None,
  ):
    """Meets the others once all have loaded their engines.

    Args:
      config: See `configs/no_spill_cost.py`.
      case: What this process takes part in, `SEPARATE` or `SHARING`.
      number: Of this process, among those of the case.
      meanwhile: Called again and again while others have their turn.
    """
    num_separate = (
      config.cluster.num_instances if SEPARATE in config.cases else 0
    )
    # Of the group only process 0 runs cases.
    has_sharing = bool({SHARING, "spilling"} & set(config.cases))
    self._case = case
    self._cases = [name for name in _ORDER if name in config.cases]
    self._meanwhile = meanwhile
    self._barrier = FileBarrier(
      pathlib.Path(config.child.folder) / "barrier",
      number if case == SEPARATE else num_separate,
      num_separate + has_sharing,
      config.cluster.patience_s,
    )
    self._meet("loaded")

  @contextlib.contextmanager
  def turn(self, repeat: int) -> Iterator[None]:
    """Waits for this process's turn, and behind it for those of others.

    Args:
      repeat: How many there were before.
    """
    for case in self._cases:
      self._meet(f"{case} {repeat} begins")
      if case == self._case:
        yield
      self._meet(f"{case} {repeat} is over")

  def _meet(self, name: str) -> None:
    self._barrier.meet(name, self._meanwhile)
