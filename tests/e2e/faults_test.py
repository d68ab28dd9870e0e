"""Whatever goes wrong between instances, no token is ever wrong.

Each test disturbs a run and shows that the disturbance was noticed, that the
disturbed request still ends right, that the others are not disturbed, and that
every rBlock is free in the end. `Rig.step` compares each token as it comes.
"""

import jax
import numpy as np
import pytest

from infinite_llm.cache.rblock import Location
from infinite_llm.engine import model_runner
from infinite_llm.engine.group_inputs import empty_payloads
from infinite_llm.errors import CoverageError
from infinite_llm.scheduler.lease_messages import (
  Grant,
  Release,
  SlotName,
)
from infinite_llm.types import NO_EPOCH
from tests.e2e.rig import LONG, WORKLOAD, Ask, right_answers

STAGES = pytest.mark.parametrize("stage", ["prefill", "decode"])
OWNER = WORKLOAD[LONG].instance


def start(rig):
  """Adds the workload; its tokens are compared from now on."""
  rig.expected = right_answers()
  rig.add(WORKLOAD)


def end(rig, before_step=lambda: None, disturbed=(LONG,)):
  """All requests end right, and nobody but `disturbed` had to try again."""
  outputs = rig.drain(before_step)
  for name, right in right_answers().items():
    assert outputs[name].token_ids == right, (name, outputs[name].error)
  assert set(rig.failed_rows) <= set(disturbed)
  assert set(rig.preempted) <= set(disturbed)
  rig.finish()


def during(rig, patch, stage, disturb, times=1):
  """Calls `disturb()` right before group programs that compute `LONG`.

  The devices have all table entries by then: a step for which they had to be
  placed elsewhere would write them anew, and mend them.

  Args:
    rig: The engine.
    patch: Undoes this.
    stage: "prefill" or "decode".
    disturb: What to do.
    times: How often at most. After the first, every stage is disturbed.

  Returns:
    A list that gets an entry with each call.
  """
  calls = []
  group_step = rig.engine.runner.group_step

  def disturbed(rows, slots, *, is_prefill, **options):
    request = rig.request(LONG)
    uids = [row.table.uid for row in rows[OWNER]]
    if (
      request
      and request.uid in uids
      and (calls or is_prefill == (stage == "prefill"))
      and len(calls) < times
    ):
      calls.append(rig.lent(LONG))
      rig.place_tables(rows)
      disturb()
    return group_step(rows, slots, is_prefill=is_prefill, **options)

  patch.setattr(rig.engine.runner, "group_step", disturbed)
  return calls


def spilled(rig):
  """The creditor with most of `LONG`'s rBlocks, and its row and version."""
  lent = rig.lent(LONG)
  holders = [where.instance for _, where in lent]
  creditor = max(set(holders), key=holders.count)
  info = rig.engine.group.managers[OWNER].spill(rig.request(LONG).uid)
  row = OWNER * rig.engine.config.lending.spill_slots + info.slot
  return creditor, row, info.versions[creditor]


def change_table(rig, lie):
  """Gives a creditor's device a hosted table that its books disown."""
  creditor, row, version = spilled(rig)
  hosted = jax.tree.map(np.array, rig.uploads[creditor][-1])
  place = version % 2, row
  assert hosted.version[place] == version
  assert hosted.counts[place] > 1
  first = hosted.starts[place]

  def change_entries(block_ids, logical_ids):
    match lie:
      case "swapped":
        pair = logical_ids[first : first + 2]
        pair[:] = pair[::-1].copy()
      case "other block":
        block_ids[first] = 1  # That of a short request.
      case "elsewhere":
        # What lies behind may be an old entry of this very table, and to read
        # that one instead would be right.
        block_ids[first + hosted.counts[place]] = 1

  match lie:
    case "fewer":
      hosted.counts[place] -= 1
    case "elsewhere":
      rig.change_entries(creditor, change_entries)
      hosted.starts[place] += 1
    case "epoch":
      hosted.epoch[row] += 1
    case "version":
      hosted.version[place] += 2
    case _:
      rig.change_entries(creditor, change_entries)
  rig.engine.runner.upload_hosted(creditor, hosted)


class TestStaleHostedTable:
  """The device's table is not the one that the books know."""

  @STAGES
  def test_an_older_upload_is_noticed_and_installed_anew(
    self, rig, monkeypatch, stage
  ):
    def disturb():
      creditor, row, version = spilled(rig)
      older = [
        tables
        for tables in rig.uploads[creditor]
        if tables.version[version % 2, row] != version
      ]
      rig.engine.runner.upload_hosted(creditor, older[-1])

    start(rig)
    calls = during(rig, monkeypatch, stage, disturb)
    unproved = rig.engine.num_unproved_rows
    # All that the creditor hosts is as it was then.
    end(rig, disturbed=(LONG, "other"))
    assert calls
    assert rig.failed_rows[LONG] == 1
    failed = rig.failed_rows.total()
    assert rig.engine.num_unproved_rows == unproved + failed
    assert rig.mail.sent["Sync"] > 0
    assert not rig.preempted

  @STAGES
  @pytest.mark.parametrize(
    "lie",
    ["fewer", "elsewhere", "swapped", "other block", "epoch", "version"],
  )
  def test_a_table_that_lies_is_noticed_and_installed_anew(
    self, rig, monkeypatch, stage, lie
  ):
    start(rig)
    calls = during(rig, monkeypatch, stage, lambda: change_table(rig, lie))
    end(rig)
    assert calls
    assert rig.failed_rows[LONG] == 1
    assert rig.mail.sent["Sync"] > 0
    assert not rig.preempted

  def test_a_lost_upload_is_noticed_before_the_old_copies_go(
    self, rig, monkeypatch
  ):
    upload_hosted = rig.engine.runner.upload_hosted
    lost = []

    def lose_first(instance, rows):
      slots = rig.engine.config.lending.spill_slots
      hosts_mine = rows.counts[:, OWNER * slots : (OWNER + 1) * slots].any()
      if hosts_mine and not lost:
        lost.append(instance)
      else:
        upload_hosted(instance, rows)

    monkeypatch.setattr(rig.engine.runner, "upload_hosted", lose_first)
    unproved = rig.engine.group.num_unproved_moves
    start(rig)
    end(rig)
    assert lost
    assert rig.engine.group.num_unproved_moves == unproved + 1
    assert not rig.failed_rows
    assert not rig.preempted


class TestStaleOwnTable:
  """The entries of rBlocks at home are not what the books know."""

  @STAGES
  @pytest.mark.parametrize("lie", ["other number", "other block"])
  def test_entries_that_lie_are_noticed_and_written_anew(
    self, rig, monkeypatch, stage, lie
  ):
    def change(block_ids, logical_ids):
      request = rig.request(LONG)
      table = rig.engine.group.managers[OWNER].table(request.uid)
      mine = table.local_entries()
      # The newest full one: older ones may be about to move away.
      last = len(mine.below(request.num_computed_tokens // 16)) - 1
      # Every place that names it, in use or not.
      (places,) = np.nonzero(
        (block_ids == mine.block_ids[last])
        & (logical_ids == mine.logical_ids[last])
      )
      assert last > 0 and len(places)
      match lie:
        case "other number":
          logical_ids[places] += 1
        case "other block":
          block_ids[places] = mine.block_ids[0]

    start(rig)
    calls = during(
      rig, monkeypatch, stage, lambda: rig.change_entries(OWNER, change)
    )
    end(rig)
    assert calls
    assert rig.failed_rows[LONG] == 2
    assert rig.preempted == {LONG: 1}


class TestWrongContent:
  """A device holds something else than the tables say."""

  @STAGES
  @pytest.mark.parametrize("fault", ["removed", "recycled", "swapped"])
  @pytest.mark.parametrize("place", ["lent", "home"])
  def test_it_is_noticed_and_computed_anew(
    self, rig, monkeypatch, stage, place, fault
  ):
    def disturb():
      lies = rig.lies(LONG)
      mine = [
        where
        for where in lies[: rig.request(LONG).num_computed_tokens // 16]
        if (where.instance == OWNER) == (place == "home")
      ]
      match fault:
        case "removed":
          rig.remove(mine[0])
        case "recycled":  # Another request's step wrote there.
          rig.write(mine[0], *rig.read(rig.lies("other")[-2]))
        case "swapped":
          rig.swap(mine[0], mine[1])

    start(rig)
    calls = during(rig, monkeypatch, stage, disturb)
    unproved = rig.engine.num_unproved_rows
    end(rig)
    assert calls
    # Once by the step, once more after the creditors installed tables anew.
    assert rig.failed_rows[LONG] == 2
    assert rig.engine.num_unproved_rows == unproved + 2
    assert rig.preempted == {LONG: 1}

  def test_a_swap_with_another_request_disturbs_both_and_ends_right(
    self, rig, monkeypatch
  ):
    def disturb():
      _, mine = rig.lent(LONG)[0]
      theirs = next(
        where
        for _, where in rig.lent("other")
        if where.instance == mine.instance
      )
      rig.swap(mine, theirs)

    start(rig)
    # At the first opportunity both have rBlocks with the same creditor.
    calls = during(rig, monkeypatch, "prefill", disturb)
    end(rig, disturbed=(LONG, "other"))
    assert calls
    assert set(rig.failed_rows) == {LONG, "other"}

  @pytest.mark.parametrize("is_uploaded", [True, False])
  def test_a_lease_that_the_creditor_forgot_and_reused_is_noticed(
    self, rig, monkeypatch, is_uploaded
  ):
    """A Release that nobody sent; with and without a table to match on top."""
    forgotten = []
    upload_hosted = rig.engine.runner.upload_hosted

    def forge_release():
      request = rig.request(LONG)
      if forgotten or request is None or not request.output_token_ids:
        return
      creditor, _, _ = spilled(rig)
      forgotten.extend(
        where for _, where in rig.lent(LONG) if where.instance == creditor
      )
      slot = rig.engine.group.managers[OWNER].spill(request.uid)
      grants = tuple(
        Grant(block_id=where.block_id, epoch=where.epoch) for where in forgotten
      )
      name = SlotName(slot=slot.slot, epoch=slot.slot_epoch)
      rig.forge(OWNER, creditor, Release(slot=name, grants=grants))
      # It takes the rBlocks, and writes its own KV and tags there.
      rig.add({"thief": Ask(16 * 7, 4, creditor)})

    def keep_old(instance, rows):
      is_stale = forgotten and instance == forgotten[0].instance
      if not is_stale or rig.failed_rows[LONG] > 0 or is_uploaded:
        upload_hosted(instance, rows)

    monkeypatch.setattr(rig.engine.runner, "upload_hosted", keep_old)
    start(rig)
    # What is not uploaded may be of another request as well.
    disturbed = (LONG,) if is_uploaded else (LONG, "other")
    end(rig, forge_release, disturbed=disturbed)
    assert forgotten
    assert rig.failed_rows[LONG] > 0
    assert rig.preempted[LONG] == 1


def moves_of(shift, payloads):
  """Where a program's payloads from `OWNER` go: `(instance, block, epoch)`."""
  sent = payloads[OWNER]
  to = (OWNER + shift) % len(payloads)
  return [
    (to, int(sent.dst_block[i]), int(sent.dst_epoch[i]))
    for i in np.flatnonzero(sent.dst_block)
  ]


def device_epoch(rig, instance, block_id):
  return int(rig.engine.runner.pool.row(instance).epoch[block_id])


def pool_contents(rig):
  """All that the devices hold, but for the null blocks."""
  rows = range(rig.engine.config.num_instances)
  pools = [jax.device_get(rig.engine.runner.pool.row(i)) for i in rows]
  return [tuple(np.array(part[1:]) for part in pool) for pool in pools]


class InFlight:
  """Payloads from `OWNER` on their way, with the contents they set out with."""

  def __init__(self, rig, shift, payloads):
    self._nothing = empty_payloads(*payloads[OWNER].dst_block.shape)
    self._rig = rig
    self._shift = shift
    self._payloads = [self._nothing] * len(payloads)
    self._payloads[OWNER] = payloads[OWNER]
    self.moves = moves_of(shift, payloads)
    self._sources = [
      Location(instance=OWNER, block_id=int(block_id), epoch=1)
      for block_id in set(payloads[OWNER].src_block.flat) - {0}
    ]
    self._contents = [rig.read(source) for source in self._sources]

  def lose(self):
    """What is sent instead."""
    return self._nothing

  def check_dropped(self, exchange):
    """They arrive, and nothing changes on any device."""
    before = pool_contents(self._rig)
    now = [self._rig.read(source) for source in self._sources]
    # The program reads what it sends; these were read long ago.
    self._write(self._contents)
    exchange(self._shift, self._payloads)
    self._write(now)
    for old, new in zip(before, pool_contents(self._rig), strict=True):
      for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a, b)

  def _write(self, contents):
    for source, content in zip(self._sources, contents, strict=True):
      self._rig.write(source, *content)


class TestHolders:
  """A chunk does not go to an instance that holds some of its context."""

  def test_a_shift_that_is_left_out_is_noticed(self, rig, monkeypatch):
    shifts_of_slots = model_runner.shifts_of_slots
    cleared = []

    def forget(owner, slots):
      holders = shifts_of_slots(owner, slots)
      if owner == OWNER and calls and not cleared:  # In the disturbed program.
        creditor, _, _ = spilled(rig)
        shift = (creditor - OWNER) % len(holders)
        assert holders[shift]
        holders[shift] = False
        cleared.append(shift)
      return holders

    monkeypatch.setattr(model_runner, "shifts_of_slots", forget)
    start(rig)
    calls = during(rig, monkeypatch, "prefill", lambda: None)
    # Another owner's chunk may need the same shift.
    end(rig, disturbed=(LONG, "other"))
    assert cleared
    assert rig.failed_rows[LONG] == 1
    assert not rig.preempted


class TestExchange:
  """Payloads that do not arrive, or arrive when they should not."""

  def hold_first(self, rig, monkeypatch):
    """The first payloads from `OWNER` stay on the way; returns them."""
    exchange = rig.engine.runner.exchange
    held = []

    def hold(shift, payloads):
      if not held and moves_of(shift, payloads):
        held.append(InFlight(rig, shift, payloads))
        payloads = list(payloads)
        payloads[OWNER] = held[0].lose()
      return exchange(shift, payloads)

    monkeypatch.setattr(rig.engine.runner, "exchange", hold)
    return held, exchange

  def test_one_that_does_not_happen_is_noticed(self, rig, monkeypatch):
    held, _ = self.hold_first(rig, monkeypatch)
    unproved = rig.engine.group.num_unproved_moves
    start(rig)
    end(rig)
    assert held
    assert rig.engine.group.num_unproved_moves == unproved + 1
    assert not rig.failed_rows
    assert not rig.preempted

  @pytest.mark.parametrize("is_granted_anew", [True, False])
  def test_a_late_payload_is_dropped(self, rig, monkeypatch, is_granted_anew):
    held, exchange = self.hold_first(rig, monkeypatch)
    late = []

    def arrive_late():
      if not held or late:
        return
      epochs = [
        (device_epoch(rig, to, block), epoch)
        for to, block, epoch in held[0].moves
      ]
      if any(mine == sent for mine, sent in epochs):
        return  # The reservation has not ended: it would not be late.
      if any(mine != NO_EPOCH for mine, _ in epochs) == is_granted_anew:
        late.append(epochs)
        held[0].check_dropped(exchange)

    for _ in range(2):  # The second run is granted the same rBlocks.
      start(rig)
      end(rig, arrive_late)
    assert late

  def test_a_repeated_payload_cannot_hit_a_recycled_rblock(
    self, rig, monkeypatch
  ):
    exchange = rig.engine.runner.exchange
    sent, dropped = [], []

    def record(shift, payloads):
      if moves_of(shift, payloads):
        sent.append(InFlight(rig, shift, payloads))
      return exchange(shift, payloads)

    monkeypatch.setattr(rig.engine.runner, "exchange", record)
    start(rig)
    end(rig)
    first = tuple(sent)

    def repeat():
      for late in first:
        if any(device_epoch(rig, to, block) for to, block, _ in late.moves):
          dropped.append(late)
          late.check_dropped(exchange)

    start(rig)
    end(rig, repeat)
    assert dropped
    assert not rig.failed_rows

  @STAGES
  def test_a_repeated_payload_whose_source_is_gone_hurts_nobody(
    self, rig, monkeypatch, stage
  ):
    """Its reservation is still good, but what it would carry is not."""
    exchange = rig.engine.runner.exchange
    sent = []

    def record(shift, payloads):
      if moves_of(shift, payloads):
        sent.append((shift, payloads))
      return exchange(shift, payloads)

    def repeat():
      for shift, payloads in tuple(sent):
        exchange(shift, payloads)

    monkeypatch.setattr(rig.engine.runner, "exchange", record)
    start(rig)
    calls = during(rig, monkeypatch, stage, repeat)
    end(rig)
    assert calls
    assert sent
    assert not rig.failed_rows
    assert not rig.preempted


class TestPersistentFault:
  """What fails each time ends its own request, and nobody else's."""

  def check_fails(self, rig):
    start(rig)
    outputs = rig.drain()
    error = outputs[LONG].error
    assert outputs[LONG].finish_reason == "error"
    assert isinstance(error, CoverageError), error
    most = rig.engine.config.scheduler.max_row_attempts
    for word in (LONG, f"instance {OWNER}", f"{most + 1} times"):
      assert word in str(error)
    # A request that comes further than ever before begins to count anew.
    assert all(count <= most + 1 for count in rig.failed_at.values())
    assert rig.preempted[LONG] <= most * max(len(rig.failed_at), 1)
    for name, right in right_answers().items():
      if name != LONG:
        assert outputs[name].token_ids == right
    assert set(rig.failed_rows) <= {LONG}
    rig.finish()
    rig.expected = {}

  @STAGES
  @pytest.mark.parametrize("place", ["lent", "home"])
  def test_content_that_is_always_lost(self, rig, monkeypatch, stage, place):
    def disturb():
      index = 0 if place == "home" else -1
      lies = sorted(rig.lies(LONG), key=lambda w: w.instance != OWNER)
      rig.remove(lies[index])

    during(rig, monkeypatch, stage, disturb, times=10_000)
    self.check_fails(rig)
    assert rig.failed_rows[LONG] > 1

  def test_tables_that_never_reach_the_devices(self, rig, monkeypatch):
    slots = rig.engine.config.lending.spill_slots
    mine = slice(OWNER * slots, (OWNER + 1) * slots)
    upload_hosted = rig.engine.runner.upload_hosted

    def lose(instance, rows):
      rows.version[:, mine] = -1
      upload_hosted(instance, rows)

    monkeypatch.setattr(rig.engine.runner, "upload_hosted", lose)
    self.check_fails(rig)

  def test_payloads_that_never_arrive(self, rig, monkeypatch):
    exchange = rig.engine.runner.exchange

    def lose(shift, payloads):
      nothing = empty_payloads(*payloads[OWNER].dst_block.shape)
      return exchange(
        shift,
        [
          nothing if instance == OWNER else sent
          for instance, sent in enumerate(payloads)
        ],
      )

    monkeypatch.setattr(rig.engine.runner, "exchange", lose)
    unproved = rig.engine.group.num_unproved_moves
    self.check_fails(rig)
    assert rig.engine.group.num_unproved_moves > unproved

  def test_rblocks_at_home_that_are_always_lost(self, rig, monkeypatch):
    local_step = rig.engine.runner.local_step

    def lose(instance, rows, **options):
      for row in rows:
        if instance == OWNER and row.start > 0:
          rig.remove(row.table.location(0))
      return local_step(instance, rows, **options)

    monkeypatch.setattr(rig.engine.runner, "local_step", lose)
    self.check_fails(rig)
