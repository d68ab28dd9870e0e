"""What group programs read beside the batch, as numpy arrays to fill in."""

from collections.abc import Iterable, Sequence

import numpy as np

from infinite_llm.attention.dist_attention import (
  NO_ROW,
  HostedTables,
  SpillSlots,
)
from infinite_llm.cache.movement import Payloads
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.hosted_tables import HostedVersion
from infinite_llm.types import NO_EPOCH, NULL_BLOCK_ID


def empty_slots(num_instances: int, num_slots: int) -> SpillSlots:
  """Spill slots of one owner that no row uses."""
  return SpillSlots(
    rows=np.full(num_slots, NO_ROW, np.int32),
    epoch=np.zeros(num_slots, np.uint32),
    versions=np.full((num_slots, num_instances), -1, np.int32),
  )


def empty_hosted(num_rows: int, capacity: int) -> HostedTables:
  """Tables of an instance that hosts nothing."""
  return HostedTables(
    block_ids=np.full((2, capacity), NULL_BLOCK_ID, np.int32),
    logical_ids=np.zeros((2, capacity), np.int32),
    starts=np.zeros((2, num_rows), np.int32),
    counts=np.zeros((2, num_rows), np.int32),
    version=np.full((2, num_rows), -1, np.int32),
    epoch=np.zeros(num_rows, np.uint32),
  )


def hosted_tables(
  versions: Iterable[HostedVersion],
  num_instances: int,
  num_slots: int,
  capacity: int,
) -> HostedTables:
  """Lays out what an instance hosts.

  Args:
    versions: All versions that an owner may name.
    num_instances: I.
    num_slots: S.
    capacity: E, most entries of each parity.
  """
  tables = empty_hosted(num_instances * num_slots, capacity)
  ends = [0, 0]
  for hosted in versions:
    row = hosted.owner * num_slots + hosted.slot
    parity = hosted.version % 2
    start, end = ends[parity], ends[parity] + len(hosted.entries)
    tables.block_ids[parity, start:end] = hosted.entries.block_ids
    tables.logical_ids[parity, start:end] = hosted.entries.logical_ids
    tables.starts[parity, row] = start
    tables.counts[parity, row] = len(hosted.entries)
    tables.version[parity, row] = hosted.version
    tables.epoch[row] = hosted.slot_epoch
    ends[parity] = end
  return tables


def empty_payloads(num_instances: int, quota: int) -> Payloads:
  """Payloads of one instance that move nothing."""
  shape = (num_instances, quota)
  return Payloads(
    src_block=np.full(shape, NULL_BLOCK_ID, np.int32),
    src_tag=np.zeros(shape, np.uint32),
    dst_block=np.full(shape, NULL_BLOCK_ID, np.int32),
    dst_epoch=np.full(shape, NO_EPOCH, np.uint32),
    dst_tag=np.zeros(shape, np.uint32),
  )


def fill_payloads(
  moves: Iterable[Move], num_instances: int, quota: int
) -> tuple[list[Payloads], list[Move]]:
  """Fills one exchange with as many moves as its quotas take.

  Args:
    moves: Moves in the order in which they are wanted.
    num_instances: I.
    quota: Q, most rBlocks per pair of instances.

  Returns:
    Payloads of each instance, and the moves that have to wait.
  """
  payloads = [
    empty_payloads(num_instances, quota) for _ in range(num_instances)
  ]
  filled = np.zeros((num_instances, num_instances), np.int64)
  waiting = []
  for move in moves:
    place = filled[move.src_instance, move.dst_instance]
    if place == quota:
      waiting.append(move)
      continue
    filled[move.src_instance, move.dst_instance] += 1
    sent = payloads[move.src_instance]
    where = (move.dst_instance, place)
    sent.src_block[where] = move.src_block
    sent.src_tag[where] = move.src_tag
    sent.dst_block[where] = move.dst_block
    sent.dst_epoch[where] = move.dst_epoch
    sent.dst_tag[where] = move.dst_tag
  return payloads, waiting


def shifts_in_use(slots: Sequence[SpillSlots]) -> np.ndarray:
  """Which shifts s carry something from an owner i to a holder i + s.

  Args:
    slots: Spill slots of every instance.

  Returns:
    `[I]` bool.
  """
  num_instances = len(slots)
  in_use = np.zeros(num_instances, bool)
  for owner, mine in enumerate(slots):
    holders = (mine.versions[mine.rows != NO_ROW] >= 0).any(axis=0)
    for holder in np.flatnonzero(holders):
      in_use[(holder - owner) % num_instances] = True
  return in_use
