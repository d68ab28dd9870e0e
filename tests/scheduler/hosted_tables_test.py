import numpy as np
import pytest

from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.messages import SlotName

_SLOT = SlotName(slot=1, epoch=4)

# Two instances with two slots each: row = owner * 2 + slot.
_ROW = 0 * 2 + 1


def _rows(tables, capacity=8):
  """`{(row, version): [(block_id, logical_id), ...]}` as the devices see it."""
  arrays = tables.arrays(2, 2, capacity)
  rows = {}
  for parity in (0, 1):
    for row, version in enumerate(arrays["version"][parity].tolist()):
      if version >= 0:
        assert version % 2 == parity
        start = arrays["starts"][parity, row]
        span = slice(start, start + arrays["counts"][parity, row])
        rows[row, version] = list(
          zip(
            arrays["block_ids"][parity, span].tolist(),
            arrays["logical_ids"][parity, span].tolist(),
            strict=True,
          )
        )
  return rows


def test_nothing_hosted_is_nothing_installed():
  arrays = HostedTables().arrays(2, 2, 3)

  assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == {
    "block_ids": ((2, 3), np.int32),
    "logical_ids": ((2, 3), np.int32),
    "starts": ((2, 4), np.int32),
    "counts": ((2, 4), np.int32),
    "version": ((2, 4), np.int32),
    "epoch": ((4,), np.uint32),
  }
  assert (arrays["version"] == -1).all()
  assert not arrays["epoch"].any()


def test_the_previous_version_stays_beside_the_next():
  tables = HostedTables()

  assert tables.add(0, _SLOT, [(5, 1), (3, 0)]) == 0
  assert _rows(tables) == {(_ROW, 0): [(3, 0), (5, 1)]}
  assert tables.add(0, _SLOT, [(2, 2)]) == 1
  assert _rows(tables) == {
    (_ROW, 0): [(3, 0), (5, 1)],
    (_ROW, 1): [(3, 0), (5, 1), (2, 2)],
  }
  assert tables.add(0, _SLOT, [(4, 3)]) == 2
  assert sorted(_rows(tables)) == [(_ROW, 1), (_ROW, 2)]
  assert tables.arrays(2, 2, 8)["epoch"].tolist() == [0, 4, 0, 0]


def test_rows_lie_one_after_another():
  tables = HostedTables()
  tables.add(1, SlotName(slot=0, epoch=1), [(1, 7)])
  tables.add(0, _SLOT, [(5, 1), (3, 0)])
  tables.add(0, SlotName(slot=0, epoch=2), [(6, 0)])

  assert _rows(tables) == {
    (0, 0): [(6, 0)],
    (1, 0): [(3, 0), (5, 1)],
    (2, 0): [(1, 7)],
  }


def test_no_version_names_a_removed_block():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0)])
  tables.add(0, _SLOT, [(5, 1)])

  assert tables.remove(0, _SLOT, [5]) == 2
  assert _rows(tables) == {(_ROW, 2): [(3, 0)]}


def test_a_block_that_only_the_previous_version_names_is_removed_too():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0), (5, 1)])
  tables.replace(0, _SLOT, [(3, 0)])

  assert tables.remove(0, _SLOT, [5]) == 2
  assert _rows(tables) == {(_ROW, 2): [(3, 0)]}


def test_removing_unknown_blocks_changes_nothing():
  tables = HostedTables()
  assert tables.remove(0, _SLOT, [5]) is None
  tables.add(0, _SLOT, [(3, 0)])
  generation = tables.generation

  assert tables.remove(0, _SLOT, [5]) == 0
  assert tables.generation == generation


def test_replacing_installs_the_same_entries_under_a_new_version():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0), (5, 1)])

  assert tables.replace(0, _SLOT, [(3, 0), (5, 1)]) == 1
  assert _rows(tables)[_ROW, 1] == [(3, 0), (5, 1)]


def test_the_next_holder_of_a_slot_starts_without_a_past():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0)])
  later = SlotName(slot=1, epoch=5)
  assert tables.is_taken(0, later)
  tables.remove(0, _SLOT, [3])
  assert not tables.is_taken(0, later)

  assert tables.add(0, later, [(4, 0)]) == 0
  assert _rows(tables) == {(_ROW, 0): [(4, 0)]}
  assert tables.remove(0, _SLOT, [4]) is None


def test_every_change_is_a_new_generation():
  tables = HostedTables()
  seen = [tables.generation]
  tables.add(0, _SLOT, [(3, 0)])
  seen.append(tables.generation)
  tables.replace(0, _SLOT, [(3, 0)])
  seen.append(tables.generation)
  tables.remove(0, _SLOT, [3])
  seen.append(tables.generation)

  assert seen == sorted(set(seen))


def test_more_entries_than_the_devices_take_are_a_bug():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0), (5, 1)])

  with pytest.raises(InvariantError, match=r"at most 1 entries; got 2"):
    tables.arrays(2, 2, 1)
