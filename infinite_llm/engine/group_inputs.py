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
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.hosted_tables import HostedVersion
from infinite_llm.types import NO_EPOCH, NULL_BLOCK_ID, InstanceId


def empty_slots(num_instances: int, num_slots: int) -> SpillSlots:
  """Spill slots of one owner that no row uses."""
  return SpillSlots(
    rows=np.full(num_slots, NO_ROW, np.int32),
    epoch=np.zeros(num_slots, np.uint32),
    versions=np.full((num_slots, num_instances), NO_VERSION, np.int32),
  )


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
) -> tuple[Payloads, list[Move]]:
  """Fills one instance's part of an exchange with what its quotas take.

  Args:
    moves: Moves from the instance, in the order in which they are wanted.
    num_instances: I.
    quota: Q, most rBlocks per pair of instances.

  Returns:
    The payloads, and the moves that have to wait.
  """
  sent = empty_payloads(num_instances, quota)
  filled = np.zeros(num_instances, np.int64)
  waiting = []
  for move in moves:
    place = filled[move.dst_instance]
    if place == quota:
      waiting.append(move)
      continue
    filled[move.dst_instance] += 1
    where = (move.dst_instance, place)
    sent.src_block[where] = move.src_block
    sent.src_tag[where] = move.src_tag
    sent.dst_block[where] = move.dst_block
    sent.dst_epoch[where] = move.dst_epoch
    sent.dst_tag[where] = move.dst_tag
  return sent, waiting


def shifts_of_payloads(sender: InstanceId, sent: Payloads) -> np.ndarray:
  """Which shifts s carry an rBlock from an instance i to i + s.

  Args:
    sender: The instance.
    sent: What it sends.

  Returns:
    `[I]` bool.
  """
  return _shifts(sender, (sent.dst_block != NULL_BLOCK_ID).any(axis=1))


def shifts_of_slots(owner: InstanceId, slots: SpillSlots) -> np.ndarray:
  """Which shifts s carry something from an owner i to a holder i + s.

  Args:
    owner: The owner.
    slots: Its spill slots.

  Returns:
    `[I]` bool.
  """
  named = slots.versions[slots.rows != NO_ROW]
  return _shifts(owner, (named >= 0).any(axis=0))


def _shifts(start: InstanceId, targets: np.ndarray) -> np.ndarray:
  """`[I]` bool by instance, as distances from one of them."""
  return np.roll(targets, -start)
