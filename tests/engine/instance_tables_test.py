"""Devices are told where hosted tables lie if, and only if, that changed."""

from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.config import engine_config
from infinite_llm.engine.instance_tables import InstanceTables
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import SlotName

N = 16


def tables_of(hosted: HostedTables) -> InstanceTables:
  config = engine_config(num_instances=2, num_blocks=N, spill_slots=2)
  tables = InstanceTables(config)
  tables.set_hosted(hosted.versions())
  return tables


def span(count: int) -> EntrySpan:
  return EntrySpan.of(list(range(count)), list(range(count)))


def test_rows_are_by_owner_and_slot_and_versions_by_parity():
  hosted = HostedTables()
  hosted.add(0, SlotName(slot=1, epoch=5), [(3, 0), (4, 1)])
  hosted.add(1, SlotName(slot=0, epoch=6), [(7, 2)])
  hosted.add(0, SlotName(slot=1, epoch=5), [(5, 2)])

  rows = tables_of(hosted).take_moved()

  assert rows is not None
  # The log of the first has three entries and room for six.
  assert rows.starts.tolist() == [[0, 0, 6, 0], [0, 0, 0, 0]]
  assert rows.counts.tolist() == [[0, 2, 1, 0], [0, 3, 0, 0]]
  assert rows.version.tolist() == [[-1, 0, 0, -1], [-1, 1, -1, -1]]
  assert rows.epoch.tolist() == [0, 5, 6, 0]


def test_steps_leave_them_alone_until_everything_is_placed_anew():
  hosted = HostedTables()
  hosted.add(0, SlotName(slot=1, epoch=5), [(3, 0), (4, 1)])
  tables = tables_of(hosted)
  assert tables.take_moved() is not None

  kept = [span(4), span(5)]
  tables.sync(kept[:1])
  tables.sync(kept[1:])
  assert tables.take_moved() is None

  tables.sync([span(10)])  # Room for 20 more than 4 + 8 + 10 is not left.
  moved = tables.take_moved()
  assert moved is not None
  assert moved.counts[0].tolist() == [0, 2, 0, 0]
  assert tables.take_moved() is None


def test_a_change_is_told_even_if_nothing_moved():
  slot = SlotName(slot=1, epoch=5)
  hosted = HostedTables()
  hosted.add(0, slot, [(3, 0), (4, 1)])
  tables = tables_of(hosted)
  before = tables.take_moved()

  hosted.add(0, slot, [(5, 2)])
  tables.set_hosted(hosted.versions())

  after = tables.take_moved()
  assert before is not None
  assert after is not None
  assert (after.starts == before.starts).all()
  assert after.version[:, 1].tolist() == [0, 1]
