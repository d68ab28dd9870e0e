from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import (
  SlotName,
)

_SLOT = SlotName(slot=1, epoch=4)


def _versions(tables):
  """`{(owner, slot, version): [(block_id, logical_id), ...]}`, in order."""
  return {
    (v.owner, v.slot, v.version): list(
      zip(
        v.entries.block_ids.tolist(),
        v.entries.logical_ids.tolist(),
        strict=True,
      )
    )
    for v in tables.versions()
  }


def _logs(tables):
  """The log of each version, newest first."""
  return [v.entries.log for v in tables.versions()]


def test_nothing_hosted_is_nothing_to_answer_with():
  assert HostedTables().versions() == ()


def test_the_previous_version_stays_beside_the_next():
  tables = HostedTables()

  assert tables.add(0, _SLOT, [(5, 1), (3, 0)]) == 0
  assert _versions(tables) == {(0, 1, 0): [(3, 0), (5, 1)]}
  assert tables.add(0, _SLOT, [(2, 2)]) == 1
  assert _versions(tables) == {
    (0, 1, 0): [(3, 0), (5, 1)],
    (0, 1, 1): [(3, 0), (5, 1), (2, 2)],
  }
  assert tables.add(0, _SLOT, [(4, 3)]) == 2
  assert sorted(_versions(tables)) == [(0, 1, 1), (0, 1, 2)]
  assert {v.slot_epoch for v in tables.versions()} == {4}


def test_versions_that_grow_at_the_end_share_a_log():
  tables = HostedTables()
  tables.add(0, _SLOT, [(5, 1), (3, 0)])
  tables.add(0, _SLOT, [(2, 4), (7, 2)])

  new, old = _logs(tables)
  assert new is old
  assert _versions(tables)[0, 1, 1] == [(3, 0), (5, 1), (7, 2), (2, 4)]


def test_an_entry_before_the_last_makes_a_new_log():
  tables = HostedTables()
  tables.add(0, _SLOT, [(5, 1), (3, 4)])
  tables.add(0, _SLOT, [(2, 2)])

  new, old = _logs(tables)
  assert new is not old
  assert _versions(tables) == {
    (0, 1, 1): [(5, 1), (2, 2), (3, 4)],
    (0, 1, 0): [(5, 1), (3, 4)],
  }


def test_an_rblock_that_is_added_again_is_named_once():
  tables = HostedTables()
  tables.add(0, _SLOT, [(5, 1), (3, 2)])

  tables.add(0, _SLOT, [(3, 7)])

  assert _versions(tables)[0, 1, 1] == [(5, 1), (3, 7)]


def test_versions_come_by_owner_and_slot():
  tables = HostedTables()
  tables.add(1, SlotName(slot=0, epoch=1), [(1, 7)])
  tables.add(0, _SLOT, [(5, 1), (3, 0)])
  tables.add(0, SlotName(slot=0, epoch=2), [(6, 0)])

  assert list(_versions(tables).items()) == [
    ((0, 0, 0), [(6, 0)]),
    ((0, 1, 0), [(3, 0), (5, 1)]),
    ((1, 0, 0), [(1, 7)]),
  ]


def test_no_version_names_a_removed_block():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0)])
  tables.add(0, _SLOT, [(5, 1)])

  assert tables.remove(0, _SLOT, [5]) == 2
  assert _versions(tables) == {(0, 1, 2): [(3, 0)]}


def test_a_block_that_only_the_previous_version_names_is_removed_too():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0), (5, 1)])
  tables.replace(0, _SLOT, [(3, 0)])

  assert tables.remove(0, _SLOT, [5]) == 2
  assert _versions(tables) == {(0, 1, 2): [(3, 0)]}


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
  assert _versions(tables)[0, 1, 1] == [(3, 0), (5, 1)]


def test_the_next_holder_of_a_slot_starts_without_a_past():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0)])
  later = SlotName(slot=1, epoch=5)
  assert tables.is_taken(0, later)
  tables.remove(0, _SLOT, [3])
  assert not tables.is_taken(0, later)

  assert tables.add(0, later, [(4, 0)]) == 0
  assert _versions(tables) == {(0, 1, 0): [(4, 0)]}
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


def test_retired_blocks_stay_in_the_previous_version():
  tables = HostedTables()
  assert tables.retire(0, _SLOT, [5]) is None
  tables.add(0, _SLOT, [(3, 0), (5, 1), (4, 2)])

  assert tables.retire(0, _SLOT, [5]) == 1
  assert _versions(tables) == {
    (0, 1, 0): [(3, 0), (5, 1), (4, 2)],
    (0, 1, 1): [(3, 0), (4, 2)],
  }
  assert tables.remove(0, _SLOT, [5]) == 2
  assert _versions(tables) == {(0, 1, 2): [(3, 0), (4, 2)]}


def test_the_tables_of_a_dead_owner_are_dropped():
  tables = HostedTables()
  tables.add(0, _SLOT, [(3, 0)])
  tables.add(1, _SLOT, [(4, 0)])
  generation = tables.generation
  tables.drop(2)
  assert tables.generation == generation
  tables.drop(0)

  assert _versions(tables) == {(1, 1, 0): [(4, 0)]}
  assert tables.generation == generation + 1
