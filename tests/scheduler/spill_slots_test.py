import pytest

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.lease_messages import (
  SlotName,
)
from infinite_llm.scheduler.spill_slots import SpillSlotPool


def test_each_taking_has_an_epoch_of_its_own():
  slots = SpillSlotPool(2)
  first, second = slots.take(), slots.take()
  assert (first, second) == (
    SlotName(slot=0, epoch=1),
    SlotName(slot=1, epoch=2),
  )
  assert slots.take() is None

  slots.give_back(first)

  assert slots.num_free == 1
  assert slots.take() == SlotName(slot=0, epoch=3)


def test_a_slot_cannot_be_given_back_twice():
  slots = SpillSlotPool(1)
  slot = slots.take()
  slots.give_back(slot)

  with pytest.raises(
    InvariantError, match=r"Spill slot 0 was given back twice"
  ):
    slots.give_back(slot)
