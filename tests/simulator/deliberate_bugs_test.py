"""Deliberate bugs, one at a time: the fault simulation finds each of them.

Most are places in the managers that answer yes (`Place`); the others replace a
function. Each is found within the stated number of seeds, and for the stated
reason. The first seeds are right without a bug.
"""

import dataclasses
import random
import re

import pytest

from infinite_llm.scheduler import (
  gmanager,
  gmanager_screening,
  reception,
  reporter,
  screening,
)
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.fault_points import Place
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import Reserve
from infinite_llm.scheduler.leases import LeaseDeadlines
from infinite_llm.scheduler.messages import ClusterStatus, Leadership
from infinite_llm.scheduler.overflow import Overflow
from infinite_llm.scheduler.reporter import Reporter
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.data_plane import DataPlane
from infinite_llm.simulator.fault_simulation import run_seed
from infinite_llm.simulator.lease_history import LeaseHistory
from infinite_llm.simulator.scenario import draw_scenario
from infinite_llm.simulator.watch import Watch
from infinite_llm.types import Tier


def _drawn(seed):
  return draw_scenario(random.Random(seed))


def _borrowing(seed):
  """Instances that run short ask others."""
  scenario = _drawn(seed)
  return dataclasses.replace(
    scenario,
    lending=dataclasses.replace(scenario.lending, policy="borrow"),
    host_blocks=0,
    host_attention=False,
    most_open=scenario.num_instances + 2,
    long_answers=0.15,
  )


def _swapping(seed):
  """Instances that run short use host memory, and copies take their time."""
  scenario = _drawn(seed)
  return dataclasses.replace(
    scenario,
    lending=dataclasses.replace(scenario.lending, policy="swap"),
    host_blocks=scenario.num_blocks,
    request_every_s=0.1,
    most_open=4 * scenario.num_instances,
    long_answers=0.9,
    copy_s=0.5,
  )


def _overflowing(seed):
  """Requests larger than all HBM, and copies take their time."""
  scenario = _drawn(seed)
  return dataclasses.replace(
    scenario,
    host_blocks=2 * scenario.num_blocks,
    host_attention=True,
    copy_s=0.5,
  )


def _with_many_crashes(seed):
  """Messages of the dead arrive late."""
  scenario = _borrowing(seed)
  return dataclasses.replace(
    scenario,
    num_instances=3,
    crash_s=0.3,
    trouble_every_s=0.1,
    plan_every_s=0.05,
    network=dataclasses.replace(scenario.network, late=0.5, late_s=2.0),
    clock_jump=0.0,
  )


def _with_long_partitions(seed):
  """Two instances that often hear nothing of each other for a lease."""
  scenario = _borrowing(seed)
  return dataclasses.replace(
    scenario,
    lending=dataclasses.replace(scenario.lending, lease_s=1.5),
    num_instances=2,
    crash_s=0.3,
    trouble_every_s=0.8,
    plan_every_s=0.05,
    partition_s=9.0,
    exchange_s=1.5,
    min_s=20.0,
    long_answers=0.9,
    network=dataclasses.replace(scenario.network, late=0.02, lost=0.02),
    clock_jump=0.0,
  )


def _with_lost_payloads(seed):
  return dataclasses.replace(
    _borrowing(seed), payload_lost=0.5, plan_every_s=0.05
  )


def _with_repeated_payloads(seed):
  return dataclasses.replace(
    _borrowing(seed), payload_repeated=0.5, plan_every_s=0.05
  )


def _forward_borrows(monkeypatch):
  """Whoever is asked for rBlocks asks somebody else for some."""
  on_message = RManager.on_message

  def forward(self, envelope):
    refused = sum(self.refused.values())
    on_message(self, envelope)
    is_refused = sum(self.refused.values()) > refused
    if isinstance(envelope.body, Reserve) and not is_refused:
      for uid in self._debtor._accounts:
        self.borrow(uid, 1)

  monkeypatch.setattr(RManager, "on_message", forward)


def _forward_borrows_later(monkeypatch):
  """Whoever was asked for rBlocks asks somebody else at its next tick."""
  on_message, tick = RManager.on_message, RManager.tick
  asked = set()

  def note(self, envelope):
    on_message(self, envelope)
    if isinstance(envelope.body, Reserve):
      asked.add(self)

  def forward(self):
    if self in asked:
      asked.remove(self)
      for uid in self._debtor._accounts:
        self.borrow(uid, 1)
    tick(self)

  monkeypatch.setattr(RManager, "on_message", note)
  monkeypatch.setattr(RManager, "tick", forward)


def _count_refused_grants(monkeypatch):
  count_lent = Creditor._count_lent
  monkeypatch.setattr(
    Creditor,
    "_count_lent",
    lambda self, owner, change: count_lent(self, owner, change or 1),
  )


def _obey_former_leaders(monkeypatch):
  """Whatever any gManager says counts, also what came before."""
  follow = Reporter.follow

  def obey(self, envelope):
    is_old = envelope.leader_epoch < self.leader_epoch
    return follow(self, envelope) or is_old

  monkeypatch.setattr(Reporter, "follow", obey)


def _follow_plans_again(monkeypatch):
  """Whatever the leader says counts, however late or often it comes."""
  monkeypatch.setattr(reporter, "_IN_ORDER", {})


def _keep_the_old_allotment(monkeypatch):
  """What a leader allotted is in force until its successor's first status."""
  on_message = RManager.on_message

  def keep(self, envelope):
    allotted_to = self.allotted_to
    on_message(self, envelope)
    if not isinstance(envelope.body, ClusterStatus):
      self.allotted_to = allotted_to

  monkeypatch.setattr(RManager, "on_message", keep)


def _lead_twice_under_one_epoch(monkeypatch):
  monkeypatch.setattr(gmanager, "_LIVES", 1)


def _obey_any_instance(monkeypatch):
  """An rManager looks at no message before it acts on it."""
  monkeypatch.setattr(reception, "fault_in", lambda *_: None)


def _believe_any_number(monkeypatch):
  """An rManager looks at who says what, but at no rBlock."""
  monkeypatch.setattr(screening, "_fault_in_names", lambda *_: None)


def _believe_any_heartbeat(monkeypatch):
  """A gManager looks at who says what, but not at whether it fits together."""
  for check in ("_fault_in_counts", "_fault_in_lent", "_fault_in_requests"):
    monkeypatch.setattr(gmanager_screening, check, lambda *_: None)


def _refuse_in_silence(monkeypatch):
  monkeypatch.setattr(GManager, "_refuse", lambda self, envelope, fault: None)


def _never_take_over(monkeypatch):
  lead = GManager._lead

  def only_from_the_start(self):
    if not self._clock():
      lead(self)

  monkeypatch.setattr(GManager, "_lead", only_from_the_start)


def _take_over_a_period_late(monkeypatch):
  """The standby waits for one more heartbeat of a leader that is dead."""
  tick = GManager.tick

  def late(self):
    lending = self._lending
    self._lending = dataclasses.replace(
      lending,
      leader_lease=0.5,
      heartbeat_every_s=3 * lending.heartbeat_every_s,
    )
    tick(self)
    self._lending = lending

  monkeypatch.setattr(GManager, "tick", late)


def _take_over_from_the_living(monkeypatch):
  """The standby does not listen to the leader."""
  on_message = GManager.on_message

  def deaf(self, envelope):
    if not isinstance(envelope.body, Leadership):
      on_message(self, envelope)

  monkeypatch.setattr(GManager, "on_message", deaf)


def _take_over_knowing_nobody(monkeypatch):
  """The standby takes no heartbeats in before it leads."""
  on_heartbeat = GManager._on_heartbeat

  def only_as_leader(self, *heard):
    if self.is_leader:
      on_heartbeat(self, *heard)

  monkeypatch.setattr(GManager, "_on_heartbeat", only_as_leader)


def _never_end_a_silent_debt(monkeypatch):
  """And the sequential model, which sees it first, looks away."""
  monkeypatch.setattr(LeaseDeadlines, "take_expired", lambda self: ())
  monkeypatch.setattr(LeaseHistory, "on_ticked", lambda self, now_s: None)


def _prove_copies_by_belief(monkeypatch):
  """What comes from HOST has the right tag, whatever was copied."""
  swap = DataPlane.swap

  def believe(self, instance, swaps, to_tier, *, is_lost):
    swap(self, instance, swaps, to_tier, is_lost=is_lost)
    target = self.hosts if to_tier is Tier.HOST else self.devices
    for one in swaps:
      target[instance].tag[one.dst_block] = one.dst_tag

  monkeypatch.setattr(DataPlane, "swap", believe)


def _free_what_is_being_copied(monkeypatch):
  """An overflowing request that ends takes all its rBlocks in HBM with it."""
  drop = Overflow.drop
  monkeypatch.setattr(
    Overflow, "drop", lambda self, uid: drop(self, uid) and ()
  )


def _keep_slabs(monkeypatch):
  """What an overflowing request had in HOST outlives it."""
  monkeypatch.setattr(Overflow, "_free_host", lambda *_: None)


def _read_slabs_before_they_are_there(monkeypatch):
  """Copies of slabs are taken for done when they begin."""
  swap = DataPlane.swap

  def forget(self, instance, swaps, to_tier, *, is_lost):
    if to_tier is Tier.HBM:
      swap(self, instance, swaps, to_tier, is_lost=is_lost)
    else:
      for one in swaps:
        self.hosts[instance].tag[one.dst_block] = one.dst_tag

  monkeypatch.setattr(DataPlane, "swap", forget)


def _accept_any_payload(monkeypatch):
  """The device does not look at reservation epochs."""
  monkeypatch.setattr(DataPlane, "accepts", lambda self, target, move: True)


def _take_all_for_proved(monkeypatch):
  """Coverage is summed, but not compared."""

  def read(self, uid, num_tokens):
    hosted = self._world.hosted()
    table, spill = self.manager.table(uid), self.manager.spill(uid)
    return self._world.plane.read(table, spill, hosted, num_tokens).pieces

  monkeypatch.setattr(Watch, "read", read)


_PLACES = {
  Place.EPOCH_UNCHECKED: (_with_long_partitions, 120, "says that it lent"),
  Place.CAP_IGNORED: (_borrowing, 10, "its cap"),
  Place.COMMIT_UNRESERVED: (_with_long_partitions, 120, "never reserved"),
  Place.EPOCHS_KEPT: (_borrowing, 10, "receives under epoch"),
  Place.TABLE_KEPT: (_borrowing, 10, "is not empty|refused to host"),
  Place.EXPIRY_SKIPPED: (_with_long_partitions, 40, "says that it lent"),
  Place.REPETITION_EXECUTED: (_borrowing, 10, "and its repetition with"),
  Place.DEAD_HEARD: (_with_many_crashes, 160, "of a dead incarnation"),
  Place.MISDIRECTED_EXECUTED: (_borrowing, 10, "meant for incarnation"),
  Place.RESTART_OVERLOOKED: (_with_many_crashes, 40, "still counts"),
  Place.DEAD_DEBTS_KEPT: (_with_many_crashes, 20, "for the one before"),
  Place.TRUST_UNLIMITED: (_with_long_partitions, 40, "trusts Location"),
  Place.COMMIT_SKIPPED: (_borrowing, 10, "trusts Location"),
  Place.PROOF_SKIPPED: (_with_lost_payloads, 20, "whose copy was not proved"),
  Place.FREED_TWICE: (_borrowing, 20, "cannot free"),
  Place.RELEASE_FORGOTTEN: (_borrowing, 20, "were never given back"),
  Place.HOME_EPOCHS_KEPT: (
    _borrowing,
    40,
    "receives under epoch|was written over",
  ),
  Place.HOME_FREED_EARLY: (_swapping, 10, "its HBM rBlock is"),
  Place.DROPPED_EARLY: (_swapping, 20, "its HOST rBlock is"),
  Place.HOST_KEPT: (_swapping, 10, "in HOST for nobody"),
}

_REPLACED = {
  _forward_borrows: (_borrowing, 30, "forwards a borrow"),
  _forward_borrows_later: (_borrowing, 30, "forwards a borrow"),
  _count_refused_grants: (_borrowing, 10, "says that it lent"),
  _obey_former_leaders: (_drawn, 20, "and obeys"),
  _follow_plans_again: (_drawn, 20, "and obeys .* came before"),
  _keep_the_old_allotment: (_borrowing, 40, "still counts on what"),
  _lead_twice_under_one_epoch: (_drawn, 60, "lead under epoch"),
  _obey_any_instance: (_drawn, 10, "must be refused and counted|Error"),
  _believe_any_number: (_drawn, 10, "must be refused and counted"),
  _believe_any_heartbeat: (_drawn, 60, "must be refused and counted"),
  _refuse_in_silence: (_drawn, 10, "must be refused and counted"),
  _never_take_over: (_drawn, 20, "stands by"),
  _take_over_a_period_late: (_drawn, 20, "stands by"),
  _take_over_from_the_living: (_drawn, 20, "leads -"),
  _take_over_knowing_nobody: (_drawn, 20, "without knowing instances"),
  _never_end_a_silent_debt: (_with_long_partitions, 40, "outlive its last"),
  _prove_copies_by_belief: (
    _swapping,
    20,
    "keeps None in HOST|proved its KV, but",
  ),
  _free_what_is_being_copied: (
    _overflowing,
    40,
    "its HBM rBlock is|cannot free for request",
  ),
  _keep_slabs: (_overflowing, 10, "in HOST for nobody"),
  _read_slabs_before_they_are_there: (_overflowing, 10, "proved its KV, but"),
  _accept_any_payload: (_with_repeated_payloads, 60, "was written over"),
  _take_all_for_proved: (_with_lost_payloads, 40, "proved its KV, but"),
}


def _first_found(scenario, num_seeds, faults=None):
  """The first violation; empty if there is none."""
  for seed in range(num_seeds):
    result = run_seed(seed, scenario=scenario(seed), faults=faults)
    if result.violation is not None:
      return result.violation
  return ""


@pytest.mark.parametrize("place", _PLACES, ids=str)
def test_a_bug_inside_the_managers_is_found(place):
  scenario, num_seeds, words = _PLACES[place]

  def faults(_):
    return lambda asked: asked == place

  assert re.search(words, _first_found(scenario, num_seeds, faults))


@pytest.mark.parametrize("bug", _REPLACED, ids=lambda bug: bug.__name__)
def test_a_replaced_function_is_found(bug, monkeypatch):
  scenario, num_seeds, words = _REPLACED[bug]
  bug(monkeypatch)

  assert re.search(words, _first_found(scenario, num_seeds))


def test_a_standby_that_waits_longer_than_it_may_is_found():
  def patient(seed):
    scenario = _drawn(seed)
    # No configuration can say so: five heartbeat periods.
    object.__setattr__(scenario.lending, "leader_lease", 5.0)
    return scenario

  assert re.search("after the leader's death", _first_found(patient, 40))


@pytest.mark.parametrize(
  "scenario",
  [
    _drawn,
    _borrowing,
    _swapping,
    _overflowing,
    _with_many_crashes,
    _with_long_partitions,
    _with_lost_payloads,
    _with_repeated_payloads,
  ],
)
def test_nothing_is_found_where_there_is_no_bug(scenario):
  assert _first_found(scenario, 10) == ""


def test_all_places_but_one_are_tried():
  # A refusal stands whatever the answer is; `_forward_borrows` is about it.
  assert set(Place) - set(_PLACES) == {Place.REFUSAL}
