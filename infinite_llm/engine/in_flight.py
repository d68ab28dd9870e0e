"""Steps that were launched and are not yet committed."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from infinite_llm.engine.programs import StepKind
from infinite_llm.engine.sampler import PendingSample
from infinite_llm.scheduler.step_plan import Row
from infinite_llm.types import InstanceId, RequestUid

IsReady = Callable[[jax.Array], bool]
"""Whether an array is computed; may wait for it."""

_POLL_S = 0.00002
"""Pause between two looks at several steps, of which any may be first. Devices
idle until the next look; Linux adds 50 us to each pause."""


def is_computed(array: jax.Array) -> bool:
  """Whether an array is computed; never waits."""
  # JAX declares `is_ready` only for its own arrays.
  return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchedStep:
  """Rows of one instance in one program, and their tokens to come.

  Attributes:
    instance: Whose rows.
    rows: In the order of the program's rows.
    pending: Their sampled tokens.
    kind: Of the program.
    launched_s: When it was launched, by the engine's clock.
  """

  instance: InstanceId
  rows: Sequence[Row]
  pending: PendingSample
  kind: StepKind
  launched_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Flight:
  """Steps that are committed together.

  Those of one instance, or of all instances that a group program joins: they
  have to wait for each other on the devices anyway, and planned together they
  share the next group program too.

  Attributes:
    steps: What was launched, in this order.
    is_group: Whether a group program is among it.
    answered: What its group programs gave, if none of the rows is in them: a
      process that only answers others knows by it that they are over.
  """

  steps: tuple[LaunchedStep, ...]
  is_group: bool
  answered: tuple[jax.Array, ...] = ()

  @property
  def instances(self) -> frozenset[InstanceId]:
    """Whose rows are in it."""
    return frozenset(step.instance for step in self.steps)


class InFlight:
  """The flights under way.

  Each instance is in two at most: in that of a group program, or a local one,
  and in one of what it launched behind it.
  """

  def __init__(self, is_ready: IsReady = is_computed):
    """Starts with none.

    Args:
      is_ready: Tells which ones are over.
    """
    self._is_ready = is_ready
    self._flights: list[Flight] = []

  def __bool__(self) -> bool:
    return bool(self._flights)

  @property
  def has_rows(self) -> bool:
    """Whether any row is under way; answers to other processes are none."""
    return any(flight.steps for flight in self._flights)

  @property
  def has_group(self) -> bool:
    """Whether a group program is under way."""
    return any(flight.is_group for flight in self._flights)

  @property
  def has_long(self) -> bool:
    """Whether a local step is under way that may be no short one."""
    return any(
      step.kind.is_prefill
      for flight in self._flights
      if not flight.is_group
      for step in flight.steps
    )

  def has_long_on(self, instance: InstanceId) -> bool:
    """Whether a program is under way on an instance that may be no short one.

    What group programs do that this process only answers is not known here.
    """
    return any(
      flight.answered or any(step.kind.is_prefill for step in flight.steps)
      for flight in self._flights
      if flight.is_group or instance in flight.instances
    )

  def holds(self, instance: InstanceId) -> bool:
    """Whether a step of an instance is under way."""
    return any(instance in flight.instances for flight in self._flights)

  def may_follow(self, instance: InstanceId) -> bool:
    """Whether a local step of an instance is under way, and nothing else."""
    own = [each for each in self._flights if instance in each.instances]
    return len(own) == 1 and not own[0].is_group

  def rows(self, instance: InstanceId) -> dict[RequestUid, Row]:
    """Rows of an instance that are under way."""
    return {
      row.uid: row
      for flight in self._flights
      for step in flight.steps
      if step.instance == instance
      for row in step.rows
    }

  def add(self, flights: Sequence[Flight]) -> None:
    """Takes what was launched just now."""
    self._flights += flights

  def wait(
    self,
    interrupted: Callable[[], bool] | None = None,
    *,
    at_once: bool = False,
  ) -> list[Flight]:
    """Waits until any flight is over. Blocks the host.

    Args:
      interrupted: Whether something else is to be done now; asked again and
        again. None if nothing else can come.
      at_once: Whether to look only, and not to wait.

    Returns:
      Those that are over, in the order of launching; they stay in here until
      `remove`. Where only one can be the next, it comes at once if nothing else
      can come: fetching its tokens waits.
    """
    is_sure = interrupted is None and not at_once
    first = self._first()
    if not first or (is_sure and len(first) == 1):
      return first
    while True:
      over = [flight for flight in first if self._is_over(flight)]
      if over or at_once or (interrupted is not None and interrupted()):
        return over
      time.sleep(_POLL_S)

  def remove(self, flight: Flight) -> None:
    """Drops a flight whose tokens were fetched."""
    self._flights.remove(flight)

  def _first(self) -> list[Flight]:
    """Those that stand behind no other of the same instance."""
    first: list[Flight] = []
    held: set[InstanceId] = set()
    for flight in self._flights:
      if held.isdisjoint(flight.instances):
        first.append(flight)
      held |= flight.instances
    return first

  def _is_over(self, flight: Flight) -> bool:
    # A program's outputs are all there at once.
    return all(map(self._is_ready, flight.answered)) and all(
      self._is_ready(step.pending.sampled.token) for step in flight.steps
    )
