"""What one instance hosts for the others, as the devices are to see it."""

import dataclasses
from collections.abc import Iterable

from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.scheduler.lease_messages import (
  SlotName,
)
from infinite_llm.types import BlockId, Epoch, InstanceId, value_type


@value_type
class HostedTable:
  """Two versions of the table of one spill slot of one owner.

  Attributes:
    slot_epoch: Epoch under which the request has the slot.
    version: Version of `current`.
    current: The newest entries.
    previous: Those of `version - 1`, for owners that still name it; None if
      nobody may.
    logical_ids: `current` by rBlock; grows with the log that `current` is of.
  """

  slot_epoch: Epoch
  version: int
  current: EntrySpan
  previous: EntrySpan | None
  logical_ids: dict[BlockId, int]


@value_type
class HostedVersion:
  """One version of a hosted table, as the devices are to answer with it.

  Attributes:
    owner: Whose slot it is.
    slot: Which one.
    slot_epoch: Epoch under which the request has the slot.
    version: Its version.
    entries: rBlocks of this instance's pool.
  """

  owner: InstanceId
  slot: int
  slot_epoch: Epoch
  version: int
  entries: EntrySpan


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
      and len(table.current) > 0
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
    added = dict(entries)
    table = self.table(owner, slot)
    if table is None:
      return self._install(owner, slot, added, None)
    current, logical_ids = table.current, table.logical_ids
    is_behind = not (len(current) and added) or min(added.values()) >= int(
      current.logical_ids[-1]
    )
    if not (is_behind and logical_ids.keys().isdisjoint(added)):
      return self._install(owner, slot, logical_ids | added, current)
    current.log.append(*_ascending(added))
    logical_ids |= added
    longer = dataclasses.replace(current, end=len(current.log))
    return self._put(
      owner, slot, longer, previous=current, logical_ids=logical_ids
    )

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
    previous = table.current if table else None
    return self._install(owner, slot, dict(entries), previous)

  def retire(
    self, owner: InstanceId, slot: SlotName, block_ids: Iterable[BlockId]
  ) -> int | None:
    """Installs a next version with fewer entries; the previous one stays.

    The owner has its own copies of these rBlocks, and may yet return to ours.

    Args:
      owner: Whose slot it is.
      slot: Which slot.
      block_ids: rBlocks that the next version is not to name.

    Returns:
      The new version; None if the slot has no table.
    """
    table = self.table(owner, slot)
    if table is None:
      return None
    left = _without(table.logical_ids, set(block_ids))
    return self._install(owner, slot, left, table.current)

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
    previous = table.previous.block_ids.tolist() if table.previous else ()
    if removed.isdisjoint(table.logical_ids) and removed.isdisjoint(previous):
      return table.version
    left = _without(table.logical_ids, removed)
    return self._install(owner, slot, left, None)

  def drop(self, owner: InstanceId) -> None:
    """Forgets all tables of an owner whose leases have ended."""
    dropped = [key for key in self._tables if key[0] == owner]
    for key in dropped:
      del self._tables[key]
    self.generation += bool(dropped)

  def versions(self) -> tuple[HostedVersion, ...]:
    """All versions that an owner may name, by owner and slot, newest first."""
    return tuple(
      HostedVersion(
        owner=owner,
        slot=slot,
        slot_epoch=table.slot_epoch,
        version=version,
        entries=entries,
      )
      for (owner, slot), table in sorted(self._tables.items())
      for version, entries in (
        (table.version, table.current),
        (table.version - 1, table.previous),
      )
      if entries is not None
    )

  def _install(
    self,
    owner: InstanceId,
    slot: SlotName,
    entries: dict[BlockId, int],
    previous: EntrySpan | None,
  ) -> int:
    """Installs a next version made of a log of its own."""
    current = EntrySpan.of(*_ascending(entries))
    return self._put(
      owner, slot, current, previous=previous, logical_ids=entries
    )

  def _put(
    self,
    owner: InstanceId,
    slot: SlotName,
    current: EntrySpan,
    *,
    previous: EntrySpan | None,
    logical_ids: dict[BlockId, int],
  ) -> int:
    table = self.table(owner, slot)
    installed = HostedTable(
      slot_epoch=slot.epoch,
      version=table.version + 1 if table else 0,
      current=current,
      previous=previous,
      logical_ids=logical_ids,
    )
    self._tables[owner, slot.slot] = installed
    self.generation += 1
    return installed.version


def _ascending(entries: dict[BlockId, int]) -> tuple[list[BlockId], list[int]]:
  """`block_ids` and `logical_ids`, by rising logical number."""
  block_ids = sorted(entries, key=entries.__getitem__)
  return block_ids, [entries[block_id] for block_id in block_ids]


def _without(
  entries: dict[BlockId, int], block_ids: set[BlockId]
) -> dict[BlockId, int]:
  return {b: n for b, n in entries.items() if b not in block_ids}
