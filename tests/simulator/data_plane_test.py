"""The model of the devices, by exact blocks of small pools."""

import dataclasses

import pytest

from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.content_tag import content_tag
from infinite_llm.cache.rblock import Location
from infinite_llm.scheduler.account import SpillInfo
from infinite_llm.scheduler.effects import (
  GrantEpochs,
  full_block_move,
  swap_blocks,
)
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import SlotName
from infinite_llm.simulator.data_plane import DataPlane
from infinite_llm.types import Tier

_UID = 7
_HOME = Location(instance=0, block_id=3, epoch=11)
_AWAY = Location(instance=1, block_id=5, epoch=21)


@pytest.fixture
def plane():
  return DataPlane(num_instances=2, num_blocks=8, block_size=8, host_blocks=4)


@pytest.fixture
def table(plane):
  """Ten tokens: a full rBlock 3 and two tokens in rBlock 4, both at home."""
  table = BlockTable(_UID, 0, 8)
  table.append([_HOME, Location(instance=0, block_id=4, epoch=12)])
  plane.write_tags(table, 0, 10)
  plane.write_tokens(table, 0, 10, is_right=True)
  return table


def _move():
  return full_block_move(_UID, 0, _HOME, _AWAY, 8)


def _grant(plane, epoch):
  effect = GrantEpochs(block_ids=(_AWAY.block_id,), epochs=(epoch,))
  plane.grant(1, effect)


def test_a_step_over_its_own_rblocks_is_proved(plane, table):
  reading = plane.read(table, None, (), 10)

  assert reading.coverage == table.demand(10)
  assert reading.pieces == ((0, 3, 0), (0, 4, 1))
  assert plane.wrong_piece(_UID, reading.pieces, 10) is None


def test_a_payload_arrives_under_the_granted_epoch_alone(plane, table):
  assert not plane.exchange(_move())
  _grant(plane, 20)
  assert not plane.exchange(_move())
  _grant(plane, _AWAY.epoch)
  assert plane.exchange(_move())

  assert (plane.num_refused, plane.num_arrived) == (2, 1)
  device = plane.devices[1]
  assert device.content[5] == (_UID, 0, 8)
  assert device.tag[5] == content_tag(
    uid=_UID, logical_id=0, epoch=21, filled=8
  )


def test_a_payload_whose_source_holds_something_else_does_not_arrive(
  plane, table
):
  _grant(plane, _AWAY.epoch)
  plane.devices[0].tag[3] = 1

  assert not plane.exchange(_move())
  assert plane.devices[1].tag[5] == 0


def test_a_grant_clears_the_tag_and_a_refusal_leaves_it(plane):
  plane.devices[1].tag[5] = 9
  _grant(plane, 0)
  assert plane.devices[1].tag[5] == 9
  _grant(plane, 4)
  assert plane.devices[1].tag[5] == 0


@pytest.mark.parametrize(
  ("slot_epoch", "version", "is_proved"),
  [(1, 0, True), (1, 1, False), (2, 0, False)],
)
def test_a_creditor_answers_with_the_named_table_alone(
  plane, table, slot_epoch, version, is_proved
):
  _grant(plane, _AWAY.epoch)
  plane.exchange(_move())
  table.switch(0, _AWAY)
  hosted = [HostedTables(), HostedTables()]
  hosted[1].add(0, SlotName(slot=2, epoch=1), [(5, 0)])
  spill = SpillInfo(slot=2, slot_epoch=slot_epoch, versions={1: version})

  reading = plane.read(table, spill, hosted, 10)
  assert (reading.coverage == table.demand(10)) is is_proved
  if is_proved:
    assert set(reading.pieces) == {(0, 4, 1), (1, 5, 0)}


def test_the_truth_sees_what_the_tags_do_not(plane, table):
  pieces = plane.read(table, None, (), 10).pieces
  plane.devices[0].content[3] = (8, 0, 8)
  assert "holds (8, 0, 8)" in plane.wrong_piece(_UID, pieces, 10)
  plane.devices[0].content[3] = None
  assert "holds None" in plane.wrong_piece(_UID, pieces, 10)


def test_rblocks_read_twice_or_not_at_all_are_wrong(plane, table):
  first, second = plane.read(table, None, (), 10).pieces
  assert "were not read" in plane.wrong_piece(_UID, [first], 10)
  assert "read twice" in plane.wrong_piece(_UID, [first, first, second], 10)


def test_tokens_of_a_step_that_was_not_proved_are_garbage(plane, table):
  plane.write_tags(table, 10, 12)
  plane.write_tokens(table, 10, 12, is_right=False)

  assert plane.devices[0].content[4] == (_UID, 1, 2)
  pieces = plane.read(table, None, (), 12).pieces
  assert plane.wrong_piece(_UID, pieces, 10) is None
  assert "with 4 tokens" in plane.wrong_piece(_UID, pieces, 12)


def test_a_reset_leaves_nothing(plane, table):
  plane.reset(0)
  assert not any(plane.devices[0].tag)
  assert plane.read(table, None, (), 10).coverage != table.demand(10)


def test_the_null_block_takes_no_payload(plane, table):
  plane.devices[1].epoch[0] = 21
  assert not plane.exchange(dataclasses.replace(_move(), dst_block=0))


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_was_swapped_out_and_in_is_proved_unless_a_copy_was_lost(
  plane, table, is_lost
):
  waiting = Location(instance=0, block_id=2, epoch=31, tier=Tier.HOST)
  back = Location(instance=0, block_id=6, epoch=13)
  out = swap_blocks(_UID, [_HOME], [waiting], 8)
  plane.swap(0, out.swaps, Tier.HOST, is_lost=is_lost)
  in_again = swap_blocks(_UID, [waiting], [back], 8)
  plane.swap(0, in_again.swaps, Tier.HBM, is_lost=False)
  entered = BlockTable(_UID, 0, 8)
  entered.append([back])

  reading = plane.read(entered, None, (), 8)

  assert (reading.coverage == entered.demand(8)) is not is_lost
  assert plane.hosts[0].content[2] == (None if is_lost else (_UID, 0, 8))
  assert plane.num_swapped == (0 if is_lost else 2)


def test_a_copy_of_what_is_not_there_any_more_proves_nothing(plane, table):
  waiting = Location(instance=0, block_id=2, epoch=31, tier=Tier.HOST)
  copy = swap_blocks(_UID, [_HOME], [waiting], 8)
  plane.write_tags(table, 0, 3)  # Rewritten, and no full rBlock any more.

  plane.swap(0, copy.swaps, Tier.HOST, is_lost=False)

  assert plane.hosts[0].tag[2] == 0
