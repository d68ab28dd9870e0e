"""What one instance hosts for the others, as the devices are to see it."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.messages import SlotName
from infinite_llm.types import NULL_BLOCK_ID, BlockId, Epoch, InstanceId

NO_VERSION = -1
"""Version of a table that is not installed."""

type Entries = Mapping[BlockId, int]
"""rBlock of this pool to its logical number in its request."""

_NOTHING: Entries = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostedTable:
  """Two versions of the table of one spill slot of one owner.

  Attributes:
    slot_epoch: Epoch under which the request has the slot.
    version: Version of `current`.
    current: The newest entries.
    previous: Those of `version - 1`, for owners that still name it; None if
      nobody may.
  """

  slot_epoch: Epoch
  version: int
  current: Entries
  previous: Entries | None


class HostedTables:
  """Hosted tables of all (owner, slot) pairs.

  A version's parity picks the device table that it lies in, so an owner can
  name the previous version while the next is installed; the owner alone
  switches (`DESIGN.md` section 5, rule 2).

  Attributes:
    generation: Rises with every change; the devices need the tables anew.
  """

  def __init__(self):
    self.generation = 0
    self._tables: dict[tuple[InstanceId, int], HostedTable] = {}

  def table(self, owner: InstanceId, slot: SlotName) -> HostedTable | None:
    """The table of a slot under an epoch; None if there is none."""
    table = self._tables.get((owner, slot.slot))
    if table is None or table.slot_epoch != slot.epoch:
      return None
    return table

  def is_taken(self, owner: InstanceId, slot: SlotName) -> bool:
    """Whether the slot still hosts something under another epoch."""
    table = self._tables.get((owner, slot.slot))
    return (
      table is not None
      and table.slot_epoch != slot.epoch
      and bool(table.current)
    )

  def add(
    self,
    owner: InstanceId,
    slot: SlotName,
    entries: Iterable[tuple[BlockId, int]],
  ) -> int:
    """Installs a next version with more entries; the previous one stays.

    Args:
      owner: Whose slot it is.
      slot: Which slot.
      entries: `(block_id, logical_id)` of each rBlock to add.

    Returns:
      The new version.
    """
    table = self.table(owner, slot)
    current = table.current if table else _NOTHING
    return self._install(owner, slot, {**current, **dict(entries)}, current)

  def replace(
    self,
    owner: InstanceId,
    slot: SlotName,
    entries: Iterable[tuple[BlockId, int]],
  ) -> int:
    """Installs a next version with just these entries; the previous one stays.

    Args:
      owner: Whose slot it is.
      slot: Which slot.
      entries: `(block_id, logical_id)` of each rBlock.

    Returns:
      The new version.
    """
    table = self.table(owner, slot)
    current = table.current if table else _NOTHING
    return self._install(owner, slot, dict(entries), current)

  def remove(
    self, owner: InstanceId, slot: SlotName, block_ids: Iterable[BlockId]
  ) -> int | None:
    """Installs a next version with fewer entries, and drops the previous one.

    The rBlocks are about to belong to somebody else, so no table may name them
    any more. The owner gave them back and reads neither version until it knows
    the new one.

    Args:
      owner: Whose slot it is.
      slot: Which slot.
      block_ids: rBlocks to remove; unknown ones are ignored.

    Returns:
      The version in force now; None if the slot has no table.
    """
    table = self.table(owner, slot)
    if table is None:
      return None
    removed = set(block_ids)
    if removed.isdisjoint({*table.current, *(table.previous or ())}):
      return table.version
    left = {b: n for b, n in table.current.items() if b not in removed}
    return self._install(owner, slot, left, None)

  def drop(self, owner: InstanceId) -> None:
    """Forgets all tables of an owner whose leases have ended."""
    dropped = [key for key in self._tables if key[0] == owner]
    for key in dropped:
      del self._tables[key]
    self.generation += bool(dropped)

  def _install(
    self,
    owner: InstanceId,
    slot: SlotName,
    current: Entries,
    previous: Entries | None,
  ) -> int:
    table = self.table(owner, slot)
    installed = HostedTable(
      slot_epoch=slot.epoch,
      version=table.version + 1 if table else 0,
      current=current,
      previous=previous if table else None,
    )
    self._tables[owner, slot.slot] = installed
    self.generation += 1
    return installed.version

  def arrays(
    self, num_instances: int, spill_slots: int, capacity: int
  ) -> dict[str, NDArray[np.int32] | NDArray[np.uint32]]:
    """The tables as the devices take them.

    Row `r = owner * spill_slots + slot`; the first axis is a version's parity.

    Args:
      num_instances: I.
      spill_slots: S.
      capacity: E, most entries of each parity.

    Returns:
      `block_ids [2, E]`, `logical_ids [2, E]`, `starts [2, I*S]`,
      `counts [2, I*S]`, `version [2, I*S]`, all int32, and `epoch [I*S]`
      uint32.
    """
    num_rows = num_instances * spill_slots
    block_ids = np.full((2, capacity), NULL_BLOCK_ID, np.int32)
    logical_ids = np.zeros((2, capacity), np.int32)
    starts = np.zeros((2, num_rows), np.int32)
    counts = np.zeros((2, num_rows), np.int32)
    version = np.full((2, num_rows), NO_VERSION, np.int32)
    epoch = np.zeros(num_rows, np.uint32)
    end = [0, 0]
    for (owner, slot), table in sorted(self._tables.items()):
      row = owner * spill_slots + slot
      epoch[row] = table.slot_epoch
      for number, entries in (
        (table.version, table.current),
        (table.version - 1, table.previous),
      ):
        if entries is None:
          continue
        parity = number % 2
        start, stop = end[parity], end[parity] + len(entries)
        if stop > capacity:
          raise InvariantError(
            f"Hosted tables must have at most {capacity} entries; got {stop}."
          )
        ordered = sorted(entries.items(), key=lambda entry: entry[1])
        block_ids[parity, start:stop] = [b for b, _ in ordered]
        logical_ids[parity, start:stop] = [n for _, n in ordered]
        starts[parity, row] = start
        counts[parity, row] = stop - start
        version[parity, row] = number
        end[parity] = stop
    return {
      "block_ids": block_ids,
      "logical_ids": logical_ids,
      "starts": starts,
      "counts": counts,
      "version": version,
      "epoch": epoch,
    }
