"""Deliberate bugs, one at a time: the fault simulation finds each of them.

Most are places in the managers that answer yes (`Place`); the others replace a
function. Each is found within the stated number of seeds, and for the stated
reason. The first seeds are right without a bug.
"""

import dataclasses
import random
import re

import pytest

from infinite_llm.scheduler import gmanager
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.fault_points import Place
from infinite_llm.scheduler.lease_messages import Reserve
from infinite_llm.scheduler.reporter import Reporter
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.data_plane import DataPlane
from infinite_llm.simulator.fault_simulation import run_seed
from infinite_llm.simulator.scenario import draw_scenario
from infinite_llm.simulator.watch import Watch


def _drawn(seed):
  return draw_scenario(random.Random(seed))


def _with_many_crashes(seed):
  """Messages of the dead arrive late."""
  scenario = _drawn(seed)
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
  scenario = _drawn(seed)
  return dataclasses.replace(
    scenario,
    num_instances=2,
    crash_s=0.3,
    trouble_every_s=0.3,
    plan_every_s=0.05,
    partition_s=6 * scenario.lending.lease_s,
    exchange_s=1.5,
    long_answers=0.6,
    network=dataclasses.replace(scenario.network, late=0.02, lost=0.02),
    clock_jump=0.0,
  )


def _with_lost_payloads(seed):
  return dataclasses.replace(_drawn(seed), payload_lost=0.5, plan_every_s=0.05)


def _with_repeated_payloads(seed):
  return dataclasses.replace(
    _drawn(seed), payload_repeated=0.5, plan_every_s=0.05
  )


def _forward_borrows(monkeypatch):
  """Whoever is asked for rBlocks asks somebody else for some."""
  on_message = RManager.on_message

  def forward(self, envelope):
    on_message(self, envelope)
    if isinstance(envelope.body, Reserve):
      for uid in self._debtor._accounts:
        self.borrow(uid, 1)

  monkeypatch.setattr(RManager, "on_message", forward)


def _count_refused_grants(monkeypatch):
  count_lent = Creditor._count_lent
  monkeypatch.setattr(
    Creditor,
    "_count_lent",
    lambda self, owner, change: count_lent(self, owner, change or 1),
  )


def _obey_former_leaders(monkeypatch):
  follow = Reporter.follow
  monkeypatch.setattr(
    Reporter, "follow", lambda self, envelope: follow(self, envelope) or True
  )


def _lead_twice_under_one_epoch(monkeypatch):
  monkeypatch.setattr(gmanager, "_LIVES", 1)


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
  Place.CAP_IGNORED: (_drawn, 10, "its cap"),
  Place.COMMIT_UNRESERVED: (_with_long_partitions, 120, "never reserved"),
  Place.EPOCHS_KEPT: (_drawn, 10, "receives under epoch"),
  Place.TABLE_KEPT: (_drawn, 10, "is not empty|refused to host"),
  Place.EXPIRY_SKIPPED: (_with_long_partitions, 40, "says that it lent"),
  Place.REPETITION_EXECUTED: (_drawn, 10, "and its repetition with"),
  Place.DEAD_HEARD: (_with_many_crashes, 80, "of a dead incarnation"),
  Place.MISDIRECTED_EXECUTED: (_drawn, 10, "meant for incarnation"),
  Place.RESTART_OVERLOOKED: (_with_many_crashes, 40, "still counts"),
  Place.TRUST_UNLIMITED: (_with_long_partitions, 120, "trusts Location"),
  Place.COMMIT_SKIPPED: (_drawn, 10, "trusts Location"),
  Place.PROOF_SKIPPED: (_with_lost_payloads, 20, "whose copy was not proved"),
  Place.FREED_TWICE: (_drawn, 20, "cannot free"),
  Place.RELEASE_FORGOTTEN: (
    _drawn,
    30,
    "Not ended|is not empty",
  ),
  Place.HOME_EPOCHS_KEPT: (_drawn, 40, "receives under epoch"),
}

_REPLACED = {
  _forward_borrows: (_drawn, 30, "forwards a borrow"),
  _count_refused_grants: (_drawn, 10, "says that it lent"),
  _obey_former_leaders: (_drawn, 20, "and obeys"),
  _lead_twice_under_one_epoch: (_drawn, 60, "lead under epoch"),
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


@pytest.mark.parametrize(
  "scenario",
  [
    _drawn,
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
