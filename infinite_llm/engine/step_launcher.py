"""From plans to programs: lays rows out, launches, samples."""

from collections.abc import Callable, Sequence

from infinite_llm.engine.in_flight import Flight, LaunchedStep
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.sampler import Sampler, SampleRow
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.scheduler.batching import Row, StepPlan
from infinite_llm.scheduler.request import Request
from infinite_llm.types import InstanceId, RequestUid

RequestOf = Callable[[RequestUid], Request]


class StepLauncher:
  """Launches what all instances planned for one step."""

  def __init__(
    self,
    runner: ModelRunner,
    group: LendingGroup,
    samplers: Sequence[Sampler],
  ):
    """Keeps what it launches with.

    Args:
      runner: The devices.
      group: Where rBlocks lie.
      samplers: Sampler of each instance.
    """
    self._runner = runner
    self._group = group
    self._samplers = samplers

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
      for rows, is_prefill in (
        (plan.local_decode, False),
        (plan.local_prefill, True),
      ):
        if rows:
          output = self._runner.local_step(
            instance,
            [self._input(instance, row, request_of) for row in rows],
            is_prefill=is_prefill,
          )
          step = self._sample(instance, rows, output, request_of)
          local.setdefault(instance, []).append(step)
    group = self._launch_group(
      [plan.group_decode for plan in plans], request_of, is_prefill=False
    ) + self._launch_group(
      [plan.group_prefill for plan in plans], request_of, is_prefill=True
    )
    joined = {step.instance for step in group}
    flights = [
      Flight(steps=tuple(steps), is_group=False)
      for instance, steps in local.items()
      if instance not in joined
    ]
    if group:
      for instance in joined:
        group += local.get(instance, ())
      flights.append(Flight(steps=tuple(group), is_group=True))
    return flights

  def _launch_group(
    self,
    rows: Sequence[Sequence[Row]],
    request_of: RequestOf,
    *,
    is_prefill: bool,
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
      is_prefill=is_prefill,
    )
    return [
      self._sample(instance, mine, outputs[instance], request_of)
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
    output: StepOutput,
    request_of: RequestOf,
  ) -> LaunchedStep:
    wanted = [
      SampleRow(row=b, request=request_of(row.uid))
      for b, row in enumerate(rows)
      if row.samples
    ]
    pending = self._samplers[instance].sample(output, wanted)
    return LaunchedStep(instance=instance, rows=rows, pending=pending)
