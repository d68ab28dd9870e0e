"""From plans to programs: lays rows out, launches, samples."""

from collections.abc import Callable, Sequence

from infinite_llm.engine.in_flight import Flight, LaunchedStep
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepKind, StepOutput
from infinite_llm.engine.sampler import Sampler, SampleRow
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.scheduler.request import Request
from infinite_llm.scheduler.step_plan import Row, StepPlan
from infinite_llm.types import InstanceId, RequestUid

_LOCAL_DECODE = StepKind(is_group=False, is_prefill=False)
_LOCAL_PREFILL = StepKind(is_group=False, is_prefill=True)
_GROUP_DECODE = StepKind(is_group=True, is_prefill=False)
GROUP_PREFILL = StepKind(is_group=True, is_prefill=True)

RequestOf = Callable[[RequestUid], Request]


class StepLauncher:
  """Launches what all instances planned for one step."""

  def __init__(
    self,
    runner: ModelRunner,
    group: LendingGroup,
    samplers: Sequence[Sampler],
    clock: Callable[[], float],
  ):
    """Keeps what it launches with.

    Args:
      runner: The devices.
      group: Where rBlocks lie.
      samplers: Sampler of each instance.
      clock: Monotonic seconds, to note when steps were launched.
    """
    self._runner = runner
    self._group = group
    self._samplers = samplers
    self._clock = clock

  def launch(
    self, plans: Sequence[StepPlan], request_of: RequestOf
  ) -> list[Flight]:
    """Launches local programs of each instance, then group programs.

    Waits for none of them, and for none launched before: every program takes
    the pools that it reads and writes donated from the one before, so each
    device runs them in the order of launching and sees what earlier ones wrote.
    That is also why an instance whose step is under way may answer for others
    in a group program: its part simply begins later.

    Args:
      plans: Plan of each instance; no rows for one whose step is under way.
      request_of: The request of a row.

    Returns:
      What was launched; nothing for instances without rows.
    """
    local: dict[InstanceId, list[LaunchedStep]] = {}
    for instance, plan in enumerate(plans):
      for rows, kind in (
        (plan.local_decode, _LOCAL_DECODE),
        (plan.local_prefill, _LOCAL_PREFILL),
      ):
        if rows:
          output = self._runner.local_step(
            instance,
            [self._input(instance, row, request_of) for row in rows],
            is_prefill=kind.is_prefill,
          )
          step = self._sample(instance, rows, kind, output, request_of)
          local.setdefault(instance, []).append(step)
    group = self._launch_group(
      [plan.group_decode for plan in plans], _GROUP_DECODE, request_of
    ) + self._launch_group(
      [plan.group_prefill for plan in plans], GROUP_PREFILL, request_of
    )
    joined = {step.instance for step in group}
    flights = [
      Flight(steps=tuple(steps), is_group=False)
      for instance, steps in local.items()
      if instance not in joined
    ]
    if group:
      for instance in sorted(joined):
        group += local.get(instance, ())
      flights.append(Flight(steps=tuple(group), is_group=True))
    return flights

  def _launch_group(
    self,
    rows: Sequence[Sequence[Row]],
    kind: StepKind,
    request_of: RequestOf,
  ) -> list[LaunchedStep]:
    if not any(rows):
      return []
    self._group.upload_tables()
    slots = self._group.slots(
      [{row.uid: b for b, row in enumerate(mine)} for mine in rows]
    )
    outputs = self._runner.group_step(
      [
        [self._input(instance, row, request_of) for row in mine]
        for instance, mine in enumerate(rows)
      ],
      slots,
      is_prefill=kind.is_prefill,
    )
    return [
      self._sample(instance, mine, kind, outputs[instance], request_of)
      for instance, mine in enumerate(rows)
      if mine
    ]

  def _input(
    self, instance: InstanceId, row: Row, request_of: RequestOf
  ) -> RowInput:
    return RowInput(
      token_ids=request_of(row.uid).tokens(row.start, row.end),
      start=row.start,
      table=self._group.managers[instance].table(row.uid),
    )

  def _sample(
    self,
    instance: InstanceId,
    rows: Sequence[Row],
    kind: StepKind,
    output: StepOutput,
    request_of: RequestOf,
  ) -> LaunchedStep:
    wanted = [
      SampleRow(row=b, request=request_of(row.uid))
      for b, row in enumerate(rows)
      if row.samples
    ]
    pending = self._samplers[instance].sample(output, wanted)
    return LaunchedStep(
      instance=instance,
      rows=rows,
      pending=pending,
      kind=kind,
      launched_s=self._clock(),
    )
