"""One instance of a simulated cluster: real manager and batcher, no devices."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import Row, StepPlan
from infinite_llm.simulator.cost_model import CostModel, Work
from infinite_llm.types import InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
  """KV that a request without rBlocks still has somewhere.

  Attributes:
    num_tokens: Of its first tokens.
    copy_s: Seconds that one token takes from there.
  """

  num_tokens: int
  copy_s: float


class KeepingBatcher(Batcher):
  """A batcher that can keep the KV of what it preempts in host memory.

  Attributes:
    kept: KV that requests get back by a copy instead of computing it.
    num_preempted: How often a request gave its rBlocks up.
    copied_s: Seconds of copies to host memory since somebody last asked.
  """

  def __init__(
    self,
    rmanager: RManager,
    scheduler: SchedulerConfig,
    lending: LendingConfig,
    block_size: int,
    cost: CostModel,
    host_tokens: int,
  ):
    """Makes a batcher without requests.

    Args:
      rmanager: The instance's manager.
      scheduler: Sizes of a step.
      lending: Sizes of a group prefill step.
      block_size: P, tokens per rBlock.
      cost: How long copies take.
      host_tokens: Tokens that host memory holds; 0 keeps nothing.
    """
    super().__init__(rmanager, scheduler, lending, block_size)
    self.kept: dict[RequestUid, Kept] = {}
    self.num_preempted = 0
    self.copied_s = 0.0
    self._requests = self._running
    self._cost = cost
    self._host_tokens = host_tokens

  def preempt(self, uid: RequestUid) -> None:
    """As `Batcher`; what fits stays in host memory."""
    num_tokens = self._requests[uid].num_computed_tokens
    in_use = sum(kept.num_tokens for kept in self.kept.values())
    if 0 < num_tokens <= self._host_tokens - in_use:
      copy_s = self._cost.swap_s(1)
      self.kept[uid] = Kept(num_tokens=num_tokens, copy_s=copy_s)
      self.copied_s += num_tokens * copy_s
    self.num_preempted += 1
    super().preempt(uid)

  def take_copied_s(self) -> float:
    """Seconds of copies to host memory that nobody was told of yet."""
    copied_s, self.copied_s = self.copied_s, 0.0
    return copied_s


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceStep:
  """What one instance does in a step.

  Attributes:
    plan: Its rows.
    work: What is to be computed here, for others' rows too.
  """

  plan: StepPlan
  work: Work

  @property
  def query_tokens(self) -> int:
    """Prompt tokens whose context lies elsewhere."""
    return sum(row.num_tokens for row in self.plan.group_prefill)

  def has_group_rows(self) -> bool:
    """Whether anybody else has to take part."""
    return bool(self.plan.group_decode or self.plan.group_prefill)


class SimulatedInstance:
  """Plans and commits steps; how long they take is not its business.

  Attributes:
    manager: The rManager.
    batcher: Continuous batching over it.
    requests: Requests that have not ended, by uid.
    is_busy: Whether a step is under way.
  """

  def __init__(
    self,
    instance: InstanceId,
    num_instances: int,
    num_blocks: int,
    block_size: int,
    lending: LendingConfig,
    scheduler: SchedulerConfig,
    cost: CostModel,
    clock: Callable[[], float],
    host_tokens: int,
  ):
    """Makes an instance without requests.

    Args:
      instance: Its number.
      num_instances: I, all of them.
      num_blocks: N, rBlocks of its pool with the null block.
      block_size: P, tokens per rBlock.
      lending: Policy and periods.
      scheduler: Sizes of a step.
      cost: How long copies take.
      clock: Simulated seconds.
      host_tokens: Tokens of preempted requests that host memory holds.
    """
    self.instance = instance
    self.manager = RManager(
      instance=instance,
      num_instances=num_instances,
      pool=BlockPool(instance, num_blocks),
      block_size=block_size,
      lending=lending,
      clock=clock,
    )
    self.batcher = KeepingBatcher(
      self.manager, scheduler, lending, block_size, cost, host_tokens
    )
    self.requests: dict[RequestUid, Request] = {}
    self.is_busy = False
    self._block_size = block_size
    self._spill_slots = lending.spill_slots

  @property
  def has_work(self) -> bool:
    """Whether any request has not ended here."""
    return bool(self.requests)

  def add(self, request: Request, kept: Kept | None = None) -> None:
    """Takes a request, and KV that it has elsewhere."""
    self.requests[request.uid] = request
    self.batcher.add(request)
    if kept is not None:
      self.batcher.kept[request.uid] = kept

  def is_running(self, uid: RequestUid) -> bool:
    """Whether a request has rBlocks here."""
    request = self.requests.get(uid)
    return request is not None and request.status is RequestStatus.RUNNING

  def creditors(self) -> set[InstanceId]:
    """Who holds rBlocks of running requests."""
    if self.manager.num_free_slots == self._spill_slots:
      return set()
    return {
      creditor
      for request in self.batcher.running
      for creditor in self.manager.table(request.uid).creditors()
    }

  def plan(self) -> InstanceStep:
    """Plans the next step; one for which others read too is not complete."""
    plan = self.batcher.plan()
    work = Work(copied_s=self.batcher.take_copied_s())
    for row in plan.local_prefill + plan.group_prefill:
      self._add_prefill(row, work)
    return InstanceStep(plan=plan, work=work)

  def read(
    self, step: InstanceStep, steps: Mapping[InstanceId, InstanceStep]
  ) -> None:
    """Notes where the rows of a step attend to what.

    Args:
      step: The step of this instance.
      steps: Those of all instances that take part, this one included.
    """
    plan, work = step.plan, step.work
    for row in plan.local_decode + plan.group_decode:
      work.rows += 1
      work.tokens += row.end
      for creditor, tokens in self._hosted_tokens(row):
        steps[creditor].work.tokens += tokens
        work.tokens -= tokens
    for row in plan.local_prefill + plan.group_prefill:
      for creditor, tokens in self._hosted_tokens(row):
        pairs = row.num_tokens * tokens
        steps[creditor].work.prefill_pairs += pairs
        work.prefill_pairs -= pairs

  def commit(self, step: InstanceStep, duration_s: float) -> list[Request]:
    """Ends a step.

    Args:
      step: What `plan` gave.
      duration_s: How long it took.

    Returns:
      Requests that got a token. A row whose request is gone got none.
    """
    advanced: list[Request] = []
    for row in step.plan.rows:
      if not self.is_running(row.uid):
        continue
      request = self._advance(row)
      if row in step.plan.group_prefill:
        request.group_token_s = duration_s / row.num_tokens
      if row.samples:
        advanced.append(request)
    return advanced

  def take_ended(self) -> list[Request]:
    """Hands out requests that ended here since the last call."""
    ended: list[Request] = []
    while (request := self.batcher.take_ended()) is not None:
      del self.requests[request.uid]
      self.batcher.kept.pop(request.uid, None)
      ended.append(request)
    return ended

  def _advance(self, row: Row) -> Request:
    request = self.requests[row.uid]
    self.batcher.advance(row)
    kept = self.batcher.kept.get(row.uid)
    if kept is not None and row.end >= kept.num_tokens:
      del self.batcher.kept[row.uid]
    if row.samples:  # Which token it is is nothing to the scheduler.
      request.output_token_ids.append(0)
    if request.num_tokens == request.max_total_tokens:
      self.batcher.finish(row.uid, RequestStatus.FINISHED_LENGTH)
    return request

  def _add_prefill(self, row: Row, work: Work) -> None:
    """Adds a row's work, except what is copied from where it was kept."""
    start = row.start
    kept = self.batcher.kept.get(row.uid)
    if kept is not None:
      start = min(max(kept.num_tokens, row.start), row.end)
      work.copied_s += (start - row.start) * kept.copy_s
    num_tokens = row.end - start
    work.prefill_tokens += num_tokens
    work.prefill_pairs += num_tokens * (start + (num_tokens + 1) / 2)

  def _hosted_tokens(self, row: Row) -> Sequence[tuple[InstanceId, int]]:
    if self.manager.spill(row.uid) is None:
      return ()
    table = self.manager.table(row.uid)
    return [
      (creditor, table.num_at(creditor) * self._block_size)
      for creditor in table.creditors()
    ]
