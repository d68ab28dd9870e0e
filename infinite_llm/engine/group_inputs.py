"""What group programs read beside the batch, as numpy arrays to fill in."""

from collections.abc import Iterable, Sequence

import numpy as np

from infinite_llm.attention.dist_attention import (
  NO_ROW,
  NO_VERSION,
  HostedRows,
  SpillSlots,
)
from infinite_llm.cache.movement import Payloads
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import SpillInfo
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.hosted_tables import HostedVersion
from infinite_llm.types import (
  NO_EPOCH,
  NULL_BLOCK_ID,
  Epoch,
  InstanceId,
  Shift,
)


def fill_granted(
  granted: Sequence[tuple[int, Epoch]], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """rBlocks and the epochs under which they may be received.

  Args:
    granted: At most `size`.
    size: Of both arrays; the null block pads.
  """
  block_ids = np.full(size, NULL_BLOCK_ID, np.int32)
  epochs = np.zeros(size, np.uint32)
  block_ids[: len(granted)] = [block_id for block_id, _ in granted]
  epochs[: len(granted)] = [epoch for _, epoch in granted]
  return block_ids, epochs


def empty_slots(num_instances: int, num_slots: int) -> SpillSlots:
  """Spill slots of one owner that no row uses."""
  return SpillSlots(
    rows=np.full(num_slots, NO_ROW, np.int32),
    epoch=np.zeros(num_slots, np.uint32),
    versions=np.full((num_slots, num_instances), NO_VERSION, np.int32),
  )


def fill_slots(
  spills: Iterable[tuple[int, SpillInfo | None]],
  num_instances: int,
  num_slots: int,
) -> SpillSlots:
  """Names an owner's requests with rBlocks elsewhere.

  Args:
    spills: Row of the step, and how it is named; None has nothing elsewhere.
    num_instances: I.
    num_slots: S.
  """
  slots = empty_slots(num_instances, num_slots)
  for row, spill in spills:
    if spill is None:
      continue
    slots.rows[spill.slot] = row
    slots.epoch[spill.slot] = spill.slot_epoch
    for holder, version in spill.versions.items():
      slots.versions[spill.slot, holder] = version
  return slots


def hosted_rows(
  versions: Sequence[HostedVersion],
  starts: Sequence[int],
  num_instances: int,
  num_slots: int,
) -> HostedRows:
  """Says where the devices find what an instance hosts.

  Args:
    versions: All versions that an owner may name.
    starts: Where the entries of each lie on the devices.
    num_instances: I.
    num_slots: S.
  """
  num_rows = num_instances * num_slots
  rows = HostedRows(
    starts=np.zeros((2, num_rows), np.int32),
    counts=np.zeros((2, num_rows), np.int32),
    version=np.full((2, num_rows), NO_VERSION, np.int32),
    epoch=np.zeros(num_rows, np.uint32),
  )
  for hosted, start in zip(versions, starts, strict=True):
    row = hosted.owner * num_slots + hosted.slot
    place = hosted.version % 2, row
    rows.starts[place] = start
    rows.counts[place] = len(hosted.entries)
    rows.version[place] = hosted.version
    rows.epoch[row] = hosted.slot_epoch
  return rows


def empty_payloads(quota: int) -> Payloads:
  """Payloads of one instance that move nothing."""
  return Payloads(
    src_block=np.full(quota, NULL_BLOCK_ID, np.int32),
    src_tag=np.zeros(quota, np.uint32),
    dst_block=np.full(quota, NULL_BLOCK_ID, np.int32),
    dst_epoch=np.full(quota, NO_EPOCH, np.uint32),
    dst_tag=np.zeros(quota, np.uint32),
  )


def fill_payloads(moves: Sequence[Move], quota: int) -> Payloads:
  """One instance's part of an exchange.

  Args:
    moves: To one other instance; at most `quota`.
    quota: Q.

  Returns:
    The payloads.
  """
  sent = empty_payloads(quota)
  for place, move in enumerate(moves):
    sent.src_block[place] = move.src_block
    sent.src_tag[place] = move.src_tag
    sent.dst_block[place] = move.dst_block
    sent.dst_epoch[place] = move.dst_epoch
    sent.dst_tag[place] = move.dst_tag
  return sent


def shift_of(move: Move, num_instances: int) -> Shift:
  """By which shift a move's rBlock travels.

  Raises:
    InvariantError: If it would stay where it is.
  """
  shift = (move.dst_instance - move.src_instance) % num_instances
  if not shift:
    raise InvariantError(f"A move must go to another instance; got {move}.")
  return shift


def shifts_of_slots(owner: InstanceId, slots: SpillSlots) -> np.ndarray:
  """Which shifts s carry something from an owner i to a holder i + s.

  Args:
    owner: The owner.
    slots: Its spill slots.

  Returns:
    `[I]` bool.
  """
  named = slots.versions[slots.rows != NO_ROW]
  return np.roll((named >= 0).any(axis=0), -owner)
