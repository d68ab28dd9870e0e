"""An owner's spill slots: who may have rBlocks elsewhere at once."""

import heapq

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.lease_messages import (
  SlotName,
)
from infinite_llm.types import NO_EPOCH


class SpillSlotPool:
  """Numbers requests for group steps; the lowest free slot is taken.

  Each taking gets a new epoch, so that a table installed for the last holder of
  a slot never answers for the next.
  """

  def __init__(self, num_slots: int):
    """Makes a pool in which all slots are free.

    Args:
      num_slots: S, slots of the owner.
    """
    self._free = list(range(num_slots))
    self._last_epoch = NO_EPOCH

  @property
  def num_free(self) -> int:
    """Slots that nobody has."""
    return len(self._free)

  def take(self) -> SlotName | None:
    """Takes a slot; None if all are taken."""
    if not self._free:
      return None
    self._last_epoch += 1
    return SlotName(slot=heapq.heappop(self._free), epoch=self._last_epoch)

  def give_back(self, slot: SlotName) -> None:
    """Frees a slot."""
    if slot.slot in self._free:
      raise InvariantError(f"Spill slot {slot.slot} was given back twice.")
    heapq.heappush(self._free, slot.slot)
