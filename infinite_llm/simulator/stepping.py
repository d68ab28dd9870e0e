"""Which simulated instances step together, and for how long.

Every step is planned when it begins and from what is true then: nobody enters
early or late, and no rBlock is taken ahead of need.
"""

import dataclasses
from collections.abc import Callable, Sequence

from infinite_llm.simulator.cost_model import CostModel, Work
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.simulated_instance import (
  InstanceStep,
  SimulatedInstance,
)
from infinite_llm.types import InstanceId

type OnStepEnd = Callable[[SimulatedInstance, InstanceStep, float], None]


class StepGroups:
  """Begins steps when all that they concern are ready, and ends them.

  Attributes:
    instance_steps: Steps of instances that had rows of their own.
    num_busy: Instances in a step now.
  """

  def __init__(
    self,
    cost: CostModel,
    network: SimulatedNetwork,
    instances: Sequence[SimulatedInstance],
    on_planned: Callable[[SimulatedInstance], None],
    on_step_end: OnStepEnd,
  ):
    """Makes groups of instances that are all idle.

    Args:
      cost: How long steps take.
      network: The time.
      instances: All instances.
      on_planned: Called after each plan.
      on_step_end: Called with the part of each instance that had rows, and with
        the seconds that the step took.
    """
    self.instance_steps = 0
    self.num_busy = 0
    self._cost = cost
    self._network = network
    self._instances = instances
    self._on_planned = on_planned
    self._on_step_end = on_step_end
    self._woken: set[InstanceId] = set()
    # Instances that wait for another one's step to end.
    self._blocked: dict[InstanceId, set[InstanceId]] = {}
    # Debts as they were when the debtor was last looked at, both ways.
    self._creditors: dict[InstanceId, set[InstanceId]] = {}
    self._debtors: dict[InstanceId, set[InstanceId]] = {}

  def wake(self, instance: SimulatedInstance) -> None:
    """Has an instance with requests step, once all that happens now did."""
    number = instance.instance
    if instance.is_busy or not instance.has_work or number in self._woken:
      return
    self._woken.add(number)
    self._network.call_later(number, 0.0, lambda: self._on_woken(instance))

  def _on_woken(self, instance: SimulatedInstance) -> None:
    self._woken.discard(instance.instance)
    if not instance.is_busy and instance.has_work:
      self._try_to_begin(instance)

  def _try_to_begin(self, instance: SimulatedInstance) -> None:
    """Begins a step of all that an instance is joined to, if all are idle."""
    members = self._joined(instance.instance)
    for member in members:
      if self._instances[member].is_busy:
        self._blocked.setdefault(member, set()).add(instance.instance)
        return
    steps: dict[InstanceId, InstanceStep] = {}
    for member in members:
      self._woken.discard(member)
      planned = self._instances[member]
      steps[member] = planned.plan()
      self._on_planned(planned)
    if any(step.has_group_rows() for step in steps.values()):
      self._begin(steps)
      return
    for member, step in steps.items():
      if step.plan.rows:
        self._begin({member: step})

  def _joined(self, start: InstanceId) -> list[InstanceId]:
    """All that are joined to an instance by debts, itself first."""
    found = {start: None}
    for number in (queue := [start]):
      creditors = self._instances[number].creditors()
      for creditor in self._creditors.get(number, set()) - creditors:
        self._debtors[creditor].discard(number)
      for creditor in creditors:
        self._debtors.setdefault(creditor, set()).add(number)
      self._creditors[number] = creditors
      for other in sorted(creditors | self._debtors.get(number, set())):
        if other not in found:
          found[other] = None
          queue.append(other)
    return list(found)

  def _begin(self, steps: dict[InstanceId, InstanceStep]) -> None:
    """Has instances step together."""
    for number, step in steps.items():
      self._instances[number].read(step, steps)
    for number, step in steps.items():
      self._instances[number].is_busy = True
      self.instance_steps += bool(step.plan.rows)
    self.num_busy += len(steps)
    duration_s = self._step_s(steps)
    self._network.call_later(
      next(iter(steps)), duration_s, lambda: self._end(steps, duration_s)
    )

  def _step_s(self, steps: dict[InstanceId, InstanceStep]) -> float:
    works = [step.work for step in steps.values()]
    if not any(step.has_group_rows() for step in steps.values()):
      return max(map(self._cost.step_s, works))
    return self._cost.group_step_s(
      [_in_group(work) for work in works],
      has_decode=any(step.plan.group_decode for step in steps.values()),
      query_tokens=sum(step.query_tokens for step in steps.values()),
    )

  def _end(
    self, steps: dict[InstanceId, InstanceStep], duration_s: float
  ) -> None:
    self.num_busy -= len(steps)
    ready = set(steps)
    for number in steps:
      self._instances[number].is_busy = False
      ready |= self._blocked.pop(number, set())
    for number, step in steps.items():
      if step.plan.rows:
        self._on_step_end(self._instances[number], step, duration_s)
    for number in sorted(ready):
      self.wake(self._instances[number])


def _in_group(work: Work) -> Work:
  """Who takes part without rows runs the layers all the same."""
  return work if work.rows else dataclasses.replace(work, rows=1)
