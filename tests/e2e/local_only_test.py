"""Requests that borrow nothing run in local programs, whatever others do."""

import collections
import itertools

import pytest

from tests.e2e.rig import LONG, WORKLOAD, Ask, right_answers

GROUP_PROGRAMS = {
  "group_decode",
  "group_prefill",
  "verify",
  "exchange",
  "grant_epochs",
}
SHORT = {
  f"short-{instance}-{n}": Ask(10 + 23 * n, 6, instance)
  for instance in range(4)
  for n in range(3)
}


@pytest.fixture
def programs_of(rig, monkeypatch):
  """Which kinds of programs computed rows of each request, by name."""
  seen = collections.defaultdict(set)
  runner = rig.engine.runner
  local_step, group_step = runner.local_step, runner.group_step

  def note(kind, rows):
    name_of = {
      request.uid: request.request_id
      for batcher in rig.engine.batchers
      for request in batcher.running
    }
    for row in rows:
      seen[name_of[row.table.uid]].add(kind)

  def local(instance, rows, **options):
    note("local", rows)
    return local_step(instance, rows, **options)

  def group(rows, slots, **options):
    kind = "group prefill" if options["is_prefill"] else "group decode"
    for mine in rows:
      note(kind, mine)
    return group_step(rows, slots, **options)

  monkeypatch.setattr(runner, "local_step", local)
  monkeypatch.setattr(runner, "group_step", group)
  return seen


def launched(rig, before):
  """Programs launched since `before`, by kind."""
  return rig.engine.runner.launches - before


def test_short_requests_launch_no_group_program(rig, programs_of):
  before = rig.engine.runner.launches.copy()
  rig.add(SHORT)
  outputs = rig.drain()
  assert all(len(outputs[name].token_ids) == 6 for name in SHORT)
  since = launched(rig, before)
  assert since["local_prefill"] > 0
  assert since["local_decode"] > 0
  assert not GROUP_PROGRAMS & set(since), since
  assert programs_of == {name: {"local"} for name in SHORT}
  assert not {"Reserve", "CandidatesRequest"} & set(rig.mail.sent)
  rig.finish()


def test_others_have_no_part_but_in_decode_steps(rig, programs_of):
  names = (LONG, "short-2", "short-3")
  # One more short request shares the instance of the one that spills.
  beside = {"beside": Ask(20, 40, WORKLOAD[LONG].instance)}
  before = rig.engine.runner.launches.copy()
  rig.expected = right_answers()
  rig.add({**{name: WORKLOAD[name] for name in names}, **beside})
  outputs = rig.drain()
  for name in names:
    assert outputs[name].token_ids == right_answers()[name]
  assert launched(rig, before)["group_decode"] >= WORKLOAD[LONG].count - 1
  assert programs_of.pop(LONG) >= {"local", "group decode"}
  assert programs_of.keys() == {"short-2", "short-3", "beside"}
  for kinds in programs_of.values():
    assert {"local"} <= kinds <= {"local", "group decode"}
  # One decode step for all rows that an instance has.
  assert "group decode" in programs_of["beside"]
  rig.finish()


def test_a_request_is_local_until_it_spills_and_group_programs_end_with_it(
  rig, programs_of
):
  rig.add({LONG: WORKLOAD[LONG], "after": Ask(30, 40, 1)})
  kinds = []

  def note():
    is_spilled = rig.request(LONG) is not None and bool(rig.lent(LONG))
    kinds.append((is_spilled, rig.engine.runner.launches.copy()))

  rig.drain(note)
  note()
  # A step begins by moving rBlocks, so it may be a group step as soon as they
  # are elsewhere when it ends.
  for (is_before, before), (is_after, after) in itertools.pairwise(kinds):
    if {"group_decode", "group_prefill"} & set(after - before):
      assert is_before or is_after
  assert kinds[0][0] is kinds[-1][0] is False
  assert any(is_spilled for is_spilled, _ in kinds)
  assert programs_of[LONG] >= {"local", "group decode"}
  assert programs_of["after"] <= {"local", "group decode"}
  rig.finish()
