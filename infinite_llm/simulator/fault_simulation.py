"""One seed, one history: a cluster with faults, from its start to its rest."""

import collections
import dataclasses
import random
import traceback
from collections.abc import Callable

from infinite_llm.scheduler.messages import Address
from infinite_llm.simulator.adversary import Adversary
from infinite_llm.simulator.cluster import Cluster
from infinite_llm.simulator.faults import Fault
from infinite_llm.simulator.scenario import Scenario, draw_scenario
from infinite_llm.simulator.trace import Observer
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import FaultPoint

_QUIET_S = 1.0
"""Seconds without anything held by anybody, after which nobody is about to."""

_MAX_DRAIN_S = 300.0
"""Seconds after which requests must have ended, all being well again."""


@dataclasses.dataclass(kw_only=True)
class SeedResult:
  """What came of one seed.

  Attributes:
    seed: The seed.
    violation: What must never happen and did; None if all was right.
    num_sent: Messages that were sent.
    num_delivered: Messages that were handed over.
    kinds: Messages that were sent, by kind.
    faults: How often each fault happened.
    troubles: How often the adversary did what else.
    plans_followed: Plans of gManagers that instances began, by kind.
    unheeded: Messages and plans that instances did not act on: "refused" as no
      sane sender would send them, "fenced" as of a former leader, "overtaken"
      by the leader's own, "declined" as impossible by then.
    num_requests: Requests that were accepted.
    num_behind: Steps that were launched behind one under way.
    num_rows: Rows that steps computed.
    num_unproved: Rows of them whose KV was not proved, so that they were not
      committed.
    num_tokens: Tokens that were emitted.
    num_failed: Requests that failed because their KV was not proved again and
      again.
    num_migrated: Requests that went to another instance.
    num_moved: Payloads that arrived.
    num_swapped: rBlocks that were copied between tiers.
    num_slabs: Slabs of requests larger than all HBM that went to HOST.
    num_takeovers: How often a standby began to lead.
    num_deaths: Deaths of leaders beside a standby whose clock did not jump.
    longest_takeover_s: Longest time from one of these, or the last word of the
      dead if that came later, until a standby led.
    time_s: Simulated seconds.
  """

  seed: int
  violation: str | None = None
  num_sent: int = 0
  num_delivered: int = 0
  kinds: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  faults: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  troubles: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  plans_followed: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  unheeded: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  num_requests: int = 0
  num_behind: int = 0
  num_rows: int = 0
  num_unproved: int = 0
  num_tokens: int = 0
  num_failed: int = 0
  num_migrated: int = 0
  num_moved: int = 0
  num_swapped: int = 0
  num_slabs: int = 0
  num_takeovers: int = 0
  num_deaths: int = 0
  longest_takeover_s: float = 0.0
  time_s: float = 0.0

  @property
  def num_faults(self) -> int:
    """Faults of all kinds."""
    return self.faults.total()

  @property
  def events(self) -> dict[str, int]:
    """Message events by kind: sendings, and what became of them.

    A message is delivered, lost, cut off or unheard, perhaps twice. What else
    happens in a simulation (ticks, steps, payloads, copies) is none.
    """
    fates = (Fault.LOST, Fault.CUT_OFF, Fault.UNHEARD)
    return {
      "sent": self.num_sent,
      "delivered": self.num_delivered,
      **{fate.value: self.faults[fate.value] for fate in fates},
    }

  @property
  def num_events(self) -> int:
    """Message events of all kinds."""
    return sum(self.events.values())


def run_seed(
  seed: int,
  *,
  scenario: Scenario | None = None,
  observer: Observer | None = None,
  note: Callable[[float, str], None] | None = None,
  faults: Callable[[Address], FaultPoint] | None = None,
) -> SeedResult:
  """Simulates one cluster.

  Args:
    seed: Decides all that happens.
    scenario: Sizes and troubles; None has the seed decide.
    observer: Hears of every message; None costs nothing.
    note: Hears of all else; None costs nothing.
    faults: Gives each manager its fault points; None has them answer as the
      scenario says.

  Returns:
    What came of it; a violation ends it at once.
  """
  rng = random.Random(seed)
  drawn = draw_scenario(rng)
  scenario = scenario or drawn
  cluster = Cluster(scenario, rng, observer=observer, note=note, faults=faults)
  adversary = Adversary(cluster, rng)
  result = SeedResult(seed=seed)
  try:
    _trouble(cluster, scenario)
    adversary.heal()
    drain(cluster)
  except Exception as error:  # Whatever a manager raises is a finding as well.
    result.violation = _describe(error)
  world = cluster.world
  result.num_sent = world.network.num_sent
  result.num_delivered = world.network.num_delivered
  result.kinds.update(world.network.kinds_sent())
  result.faults.update(_faults(cluster))
  result.troubles.update(adversary.counts)
  result.plans_followed.update(world.plans_followed)
  result.unheeded.update(cluster.unheeded)
  result.num_requests = cluster.num_accepted
  result.num_behind = world.num_behind
  result.num_rows = world.num_steps
  result.num_unproved = world.num_unproved
  result.num_tokens = world.num_tokens
  result.num_failed = world.num_failed
  result.num_migrated = cluster.num_migrated
  result.num_moved = world.plane.num_arrived
  result.num_swapped = world.plane.num_swapped
  result.num_slabs = world.num_slabs
  result.num_takeovers = cluster.gmanagers.num_takeovers
  result.num_deaths = cluster.gmanagers.num_deaths
  result.longest_takeover_s = cluster.gmanagers.longest_takeover_s
  result.time_s = world.network.now_s
  return result


def drain(cluster: Cluster) -> None:
  """Lets time pass until all requests have ended and all has been said.

  Args:
    cluster: One that is healed.

  Raises:
    ViolationError: If that never comes, or anything is wrong then.
  """
  now_s = cluster.world.network.now_s
  deadline_s = now_s + _MAX_DRAIN_S
  while cluster.num_open:
    now_s += 1.0
    cluster.run_until(now_s)
    if now_s > deadline_s:
      late = [
        f"{name} ({request.status.value}, {request.num_computed_tokens} of"
        f" {request.num_tokens} tokens)"
        for name, request in cluster.accepted.items()
        if not request.status.is_finished
      ]
      raise ViolationError(
        f"Not ended {_MAX_DRAIN_S} s after the last fault: {late}"
      )
  # Leases of those who are gone end, and what they freed is given back. Their
  # last words may still be on their way.
  scenario = cluster.world.scenario
  deadline_s = now_s + scenario.network.late_s + 3 * scenario.lending.lease_s
  empty_s = 0.0
  while empty_s < _QUIET_S and now_s < deadline_s:
    now_s += 0.5
    cluster.run_until(now_s)
    empty_s = empty_s + 0.5 if cluster.is_empty else 0.0
  cluster.check_quiescent()


def _trouble(cluster: Cluster, scenario: Scenario) -> None:
  """Lets time pass until enough has happened."""
  network = cluster.world.network
  end_s = scenario.min_s
  while True:
    cluster.run_until(end_s)
    if (
      network.num_delivered >= scenario.min_messages
      and _faults(cluster).total() >= scenario.min_faults
    ):
      return
    end_s += 1.0


def _faults(cluster: Cluster) -> collections.Counter[str]:
  """What went wrong so far, by kind."""
  counts = cluster.world.network.counts()
  faults = collections.Counter(
    {
      fault.value: n
      for fault, n in counts.items()
      if fault is not Fault.RESTART
    }
  )
  faults.update(cluster.mishaps.counts())
  faults["payload lost"] = cluster.world.num_payloads_lost
  faults["payload repeated"] = cluster.world.num_payloads_repeated
  faults["copy lost"] = cluster.world.num_copies_lost
  return +faults


def _describe(error: Exception) -> str:
  """The error, and where it was raised unless it was found by a check."""
  if isinstance(error, ViolationError):
    return str(error)
  frame = traceback.extract_tb(error.__traceback__)[-1]
  where = f"{frame.name}, line {frame.lineno}"
  return f"{type(error).__name__}: {error} (in {where})"
