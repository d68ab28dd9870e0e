"""From plans to programs: lays rows out, launches, samples."""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import jax

from infinite_llm.distributed.step_header import StepHeader
from infinite_llm.engine.in_flight import Flight, LaunchedStep
from infinite_llm.engine.layered_steps import LayeredSteps
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
  """Launches what all instances of this process planned for one step."""

  def __init__(
    self,
    runner: ModelRunner,
    group: LendingGroup,
    samplers: Sequence[Sampler],
    clock: Callable[[], float],
    layered: LayeredSteps | None,
  ):
    """Keeps what it launches with.

    Args:
      runner: The devices.
      group: Where rBlocks lie.
      samplers: Sampler of each instance.
      clock: Monotonic seconds, to note when steps were launched.
      layered: Steps that attend HOST; None if there are none.
    """
    self._layered = layered
    self._runner = runner
    self._group = group
    self._samplers = samplers
    self._clock = clock

  def warm_up(self) -> None:
    """Compiles what only an instance with host memory needs."""
    self._group.host_tiers.warm_up()
    if self._layered is not None:
      for instance, output in self._layered.warm_up():
        own = self._runner.instances.index(instance)
        self._samplers[own].warm_up(output)

  def launch(
    self,
    plans: Sequence[StepPlan],
    turn: StepHeader | None,
    request_of: RequestOf,
  ) -> list[Flight]:
    """Launches local decode steps, then group programs, then the other steps.

    So others wait for no prompt of this process in a group program. At last an
    instance may have a step that attends HOST: that one waits until its last
    slab may come. No other is waited for, and none that
    was launched before: every program takes the pools that it reads and writes
    donated from the one before, so each device runs them in the order of
    launching and sees what earlier ones wrote. That is also why an instance
    whose step is under way may answer for others in a group program: its part
    simply begins later.

    Args:
      plans: Plan of each instance.
      turn: The group programs that may be launched, and must be if others
        launch them too; None allows none.
      request_of: The request of a row.

    Returns:
      What was launched; nothing for instances without rows.
    """
    # Before local programs too: tables of leases that ended name rBlocks that
    # own requests may have by now, and there is no room for both.
    self._group.install_tables()
    short = [
      step
      for instance, plan in zip(self._runner.instances, plans, strict=True)
      for step in self._launch_local(
        instance, plan.local_decode, _LOCAL_DECODE, request_of
      )
    ]
    group, proved = [], []
    for rows, kind in (
      ([plan.group_decode for plan in plans], _GROUP_DECODE),
      ([plan.group_prefill for plan in plans], GROUP_PREFILL),
    ):
      if any(rows) or _is_awaited(turn, kind):
        steps, outputs = self._launch_group(rows, kind, turn, request_of)
        group += steps
        proved += [output.proved for output in outputs]
    rows = [plan.group_layered for plan in plans]
    bucket = turn.work.layered_tokens if _is_shared(turn) else 0
    if self._layered is not None and (any(rows) or bucket):
      steps, answers = self._launch_layered(
        self._layered, rows, bucket or None, request_of
      )
      group += steps
      proved += answers
    long = [
      step
      for instance, plan in zip(self._runner.instances, plans, strict=True)
      for step in self._launch_local(
        instance, plan.local_prefill, _LOCAL_PREFILL, request_of
      )
    ]
    # Last of all, since they block the host: others wait in group programs.
    for instance, plan in zip(self._runner.instances, plans, strict=True):
      for row in plan.layered if self._layered is not None else ():
        output = self._layered.step(
          instance, row.uid, self._input(instance, row, request_of)
        )
        step = self._sample(
          instance, (row,), _LOCAL_PREFILL, output, request_of
        )
        long.append(step)
    joined = {step.instance for step in group}
    group += [step for step in short if step.instance in joined]
    local: dict[InstanceId, list[LaunchedStep]] = {}
    for step in short:
      if step.instance not in joined:
        local.setdefault(step.instance, []).append(step)
    for step in long:
      local.setdefault(step.instance, []).append(step)
    flights = []
    if proved:  # First of all: local steps of its instances stand behind it.
      flights.append(
        Flight(
          steps=tuple(group),
          is_group=True,
          answered=() if group else tuple(proved),
        )
      )
    flights += [
      Flight(steps=tuple(steps), is_group=False) for steps in local.values()
    ]
    return flights

  def _launch_local(
    self,
    instance: InstanceId,
    rows: Sequence[Row],
    kind: StepKind,
    request_of: RequestOf,
  ) -> list[LaunchedStep]:
    """Launches rows that are all at home; nothing if there are none."""
    if not rows:
      return []
    own = self._runner.instances.index(instance)
    output = self._runner.local_step(
      instance,
      [self._input(instance, row, request_of) for row in rows],
      is_prefill=kind.is_prefill,
      newest=self._samplers[own].newest,
    )
    return [self._sample(instance, rows, kind, output, request_of)]

  def _launch_group(
    self,
    rows: Sequence[Sequence[Row]],
    kind: StepKind,
    turn: StepHeader | None,
    request_of: RequestOf,
  ) -> tuple[list[LaunchedStep], list[StepOutput]]:
    slots = self._group.slots(
      [{row.uid: b for b, row in enumerate(mine)} for mine in rows]
    )
    outputs = self._runner.group_step(
      [
        [self._input(instance, row, request_of) for row in mine]
        for instance, mine in zip(self._runner.instances, rows, strict=True)
      ],
      slots,
      is_prefill=kind.is_prefill,
      # All must launch the same program, also those with less for it.
      bucket=turn.work.prefill_tokens or None
      if _is_shared(turn) and kind.is_prefill
      else None,
    )
    steps = [
      self._sample(instance, mine, kind, output, request_of)
      for instance, mine, output in zip(
        self._runner.instances, rows, outputs, strict=True
      )
      if mine
    ]
    return steps, outputs

  def _launch_layered(
    self,
    layered: LayeredSteps,
    rows: Sequence[Sequence[Row]],
    bucket: int | None,
    request_of: RequestOf,
  ) -> tuple[list[LaunchedStep], list[jax.Array]]:
    """Launches rows with rBlocks in HOST and elsewhere, or answers for them."""
    outputs, answers = layered.group_step(
      [
        {row.uid: self._input(instance, row, request_of) for row in mine}
        for instance, mine in zip(self._runner.instances, rows, strict=True)
      ],
      self._group.slots([{row.uid: 0 for row in mine} for mine in rows]),
      bucket,
    )
    steps = [
      self._sample(instance, mine, _LOCAL_PREFILL, output, request_of)
      for instance, mine, output in zip(
        self._runner.instances, rows, outputs, strict=True
      )
      if output is not None
    ]
    return steps, answers

  def _input(
    self, instance: InstanceId, row: Row, request_of: RequestOf
  ) -> RowInput:
    own = self._runner.instances.index(instance)
    request = request_of(row.uid)
    is_known = row.start < request.num_tokens
    return RowInput(
      token_ids=request.tokens(row.start, row.end) if is_known else (0,),
      start=row.start,
      table=self._group.managers[own].table(row.uid),
      token_slot=None if is_known else self._samplers[own].slot(row.uid),
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
      SampleRow(row=b, request=request_of(row.uid), position=row.end)
      for b, row in enumerate(rows)
      if row.samples
    ]
    own = self._runner.instances.index(instance)
    pending = self._samplers[own].sample(output, wanted)
    return LaunchedStep(
      instance=instance,
      rows=rows,
      pending=pending,
      kind=kind,
      launched_s=self._clock(),
    )


def _is_shared(turn: StepHeader | None) -> TypeGuard[StepHeader]:
  """Whether other processes launch the same."""
  return turn is not None and turn.is_shared


def _is_awaited(turn: StepHeader | None, kind: StepKind) -> bool:
  """Whether other processes launch a group step, with rows here or without."""
  if not _is_shared(turn):
    return False
  return turn.work.prefill_tokens > 0 if kind.is_prefill else turn.work.decode
