"""Plans the next step of each instance, within what all processes agreed on."""

from collections.abc import Callable, Sequence

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.step_header import (
  NO_WORK,
  GroupOrder,
  GroupWork,
  StepHeader,
)
from infinite_llm.engine.in_flight import InFlight
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.errors import GroupError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.step_plan import (
  EVERYTHING,
  NOTHING,
  Ceiling,
  GroupRows,
  StepPlan,
)
from infinite_llm.types import InstanceId

_RECENT_S = 1.0
"""Age of a turn with steps after which no other is expected."""


class StepPlanner:
  """Decides when this process takes a turn, and who launches what in it."""

  def __init__(
    self,
    config: EngineConfig,
    group: LendingGroup,
    order: GroupOrder,
    in_flight: InFlight,
    batchers: Sequence[Batcher],
    clock: Callable[[], float],
  ):
    """Keeps what it decides by.

    Args:
      config: Sizes and rules.
      group: Managers and data plane.
      order: Agrees on turns with other processes.
      in_flight: Steps under way.
      batchers: Continuous batching of each instance of this process.
      clock: Monotonic seconds.
    """
    self._is_async = config.scheduler.async_scheduling
    self._buckets = (0, *config.lending.group_prefill_buckets)
    self._spill_slots = config.lending.spill_slots
    self._layered_buckets = (0, *config.layered_buckets)
    self._group = group
    self._order = order
    self._in_flight = in_flight
    self._batchers = {
      manager.instance: batcher
      for manager, batcher in zip(group.managers, batchers, strict=True)
    }
    self._managers = {manager.instance: manager for manager in group.managers}
    self._clock = clock
    self._turn_began_s = clock()
    self._has_steps = False
    self._wants_steps = False

  def next_turn(self) -> StepHeader | None:
    """The turn to take now; None if it is not agreed, or not yet time."""
    work = self._foresee()
    self._wants_steps = work.has_steps
    if (turn := self._order.next()) is None:
      return None
    # Then all rows of this process can be in its steps; and if it only answers
    # others, its own steps do not stand behind what waits for them.
    if self._in_flight and (turn.is_shared or work.has_steps):
      return None
    self._turn_began_s = self._clock()
    self._has_steps = (turn.work if turn.is_shared else work).has_steps
    return turn

  def launched(self, turn: StepHeader | None) -> None:
    """Sees to it that the turn behind this one is agreed by the end of it.

    Args:
      turn: That was taken; None if none was.
    """
    if turn is not None and turn.is_shared:
      self._foresee()

  def _foresee(self) -> GroupWork:
    """Says what there is for the next turn, and whether this process is ready.

    Returns:
      What there is; rows under way are taken for done.
    """
    work = self._group.work()
    for instance in self._batchers:
      work |= self._work(instance)
    self._order.ask(work)
    if self._order.is_called and not self._in_flight.has_long:
      self._order.ready()
    return work

  def plans(self, turn: StepHeader | None) -> list[StepPlan]:
    """Plans a step for each instance.

    Args:
      turn: The turn that is being taken; None if there is none.

    Returns:
      Plans in the order of the instances; no rows for one whose step is under
      way, or while a turn that is agreed waits for such a step.
    """
    plans = [
      batcher.plan(self._ceiling(instance, turn))
      if self._may_launch(instance, turn)
      else StepPlan()
      for instance, batcher in self._batchers.items()
    ]
    is_awaited = turn is not None and turn.is_shared and turn.work.decode
    if is_awaited or any(plan.group_decode for plan in plans):
      return [plan.joined() for plan in plans]
    return plans

  def plans_behind(self) -> list[StepPlan]:
    """Plans a local step behind that of each instance that has one under way.

    Returns:
      Plans in the order of the instances; no rows for one with rBlocks
      elsewhere, nor for any while others wait for this process: a turn begins
      when nothing is under way. While it waits for others, decode rows.
    """
    # While turns go on, others would wait for two prompts.
    has_turns = self._clock() - self._turn_began_s < _RECENT_S
    is_second = has_turns and self._has_steps and self._in_flight.has_long
    may_be_long = not (is_second or self._order.is_called)

    def plan(instance: InstanceId, batcher: Batcher) -> StepPlan:
      if not self._may_follow(instance):
        return StepPlan()
      # Moves are launched behind no long step. If one always followed another,
      # they would wait for ever.
      is_held_up = self._group.host_tiers.is_moving(
        instance
      ) and self._in_flight.has_long_on(instance)
      long = may_be_long and not is_held_up
      return batcher.plan(Ceiling(group=NOTHING, long=long, is_behind=True))

    return [plan(*each) for each in self._batchers.items()]

  def hold(self) -> None:
    """Has each instance planned next when nothing of it is under way."""
    for batcher in self._batchers.values():
      batcher.hold()

  def _may_follow(self, instance: InstanceId) -> bool:
    return (
      self._is_async
      and not self._is_awaited()
      and self._managers[instance].num_free_slots == self._spill_slots
      and self._in_flight.may_follow(instance)
      and not self._batchers[instance].is_held
    )

  def _is_awaited(self) -> bool:
    """Whether a turn with steps waits for what this process has under way."""
    if self._order.is_called:  # If it is ready, this process waits for others.
      return self._in_flight.has_long
    is_agreed = self._order.is_shared and self._order.next() is not None
    return is_agreed or self._wants_steps

  def interruption(self) -> Callable[[], bool] | None:
    """What may come before a flight is over.

    Returns:
      Whether it has come; raises `GroupError` if others let this process wait
      for too long. None where nobody waits for this process: a proof can wait
      for the step.
    """
    return self._has_call if self._order.is_shared else None

  def _work(self, instance: InstanceId) -> GroupWork:
    """What an instance has for the next turn's steps."""
    if self._managers[instance].num_free_slots == self._spill_slots:
      return NO_WORK  # Nearly always: nothing is elsewhere, or about to be.
    rows = self._batchers[instance].group_work(self._in_flight.rows(instance))
    return GroupWork(
      decode=rows.decode,
      prefill_tokens=_bucket(rows.prefill_tokens, self._buckets),
      layered_tokens=_bucket(rows.layered_tokens, self._layered_buckets),
    )

  def _ceiling(self, instance: InstanceId, turn: StepHeader | None) -> Ceiling:
    if turn is None:  # Whoever said that it is ready stays so.
      return Ceiling(group=NOTHING, long=not self._order.is_called)
    if not self._group.may_join(instance, turn):
      group = NOTHING
    elif turn.is_shared:
      group = GroupRows(
        decode=turn.work.decode,
        prefill_tokens=turn.work.prefill_tokens,
        layered_tokens=turn.work.layered_tokens,
      )
    else:
      group = EVERYTHING
    return Ceiling(group=group, is_joined=self._has_steps)

  def _may_launch(self, instance: InstanceId, turn: StepHeader | None) -> bool:
    # What is agreed begins when all rows of this process can be in it.
    is_awaited = turn is None and self._order.next() is not None
    return not (is_awaited or self._in_flight.holds(instance))

  def _has_call(self) -> bool:
    if self._in_flight.has_group:
      waited_s = self._clock() - self._turn_began_s
      if waited_s > self._order.patience_s:
        raise GroupError(
          f"Turn {self._order.next_number - 1} must end within"
          f" {self._order.patience_s:g} s; some process does not take it."
        )
    return (
      self._order.has_call()
      or self._group.has_answer
      or self._group.transport.has_mail()
    )


def _bucket(num_tokens: int, buckets: Sequence[int]) -> int:
  """The smallest that takes so many."""
  return next(size for size in buckets if size >= num_tokens)
