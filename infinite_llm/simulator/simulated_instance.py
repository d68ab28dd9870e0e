"""One instance of a simulated cluster: real manager and batcher, no devices."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import Row, StepPlan
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.simulator.cluster_config import ClusterConfig
from infinite_llm.simulator.cost_model import CostModel, Work
from infinite_llm.types import InstanceId, RequestUid, Tier


class CountingBatcher(Batcher):
  """A batcher that counts.

  Attributes:
    num_preempted: How often a request gave its rBlocks up.
  """

  num_preempted = 0

  def _await_admission(self, uid: RequestUid) -> None:
    self.num_preempted += 1
    super()._await_admission(uid)


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
    config: ClusterConfig,
    cost: CostModel,
    clock: Callable[[], float],
  ):
    """Makes an instance without requests.

    Args:
      instance: Its number.
      config: The cluster.
      cost: How long copies take.
      clock: Simulated seconds.
    """
    lending, block_size = config.lending, config.block_size
    self.instance = instance
    self.manager = RManager(
      instance=instance,
      num_instances=config.num_instances,
      pool=BlockPool(instance, config.num_blocks),
      block_size=block_size,
      lending=lending,
      clock=clock,
      host=_host_tier(instance, config, cost),
    )
    self.batcher = CountingBatcher(
      self.manager, config.scheduler, lending, block_size
    )
    self.requests: dict[RequestUid, Request] = {}
    self.is_busy = False
    self._cost = cost
    self._block_size = block_size
    self._spill_slots = lending.spill_slots
    # Tokens of each request that came from elsewhere whose KV follows it.
    self._following: dict[RequestUid, int] = {}

  @property
  def has_work(self) -> bool:
    """Whether any request has not ended here."""
    return bool(self.requests)

  def add(self, request: Request, following_tokens: int = 0) -> None:
    """Takes a request.

    Args:
      request: It has computed nothing yet.
      following_tokens: Tokens from its first on whose KV comes over the link as
        soon as the request has rBlocks for them, in place of being computed.
    """
    self.requests[request.uid] = request
    self.batcher.add(request)
    if following_tokens:
      self._following[request.uid] = following_tokens

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
    work = Work()
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
      self._following.pop(request.uid, None)
      ended.append(request)
    return ended

  def _advance(self, row: Row) -> Request:
    request = self.requests[row.uid]
    self.batcher.advance(row)
    if self._following.get(row.uid, row.end + 1) <= row.end:
      del self._following[row.uid]
    if row.samples:  # Which token it is is nothing to the scheduler.
      request.output_token_ids.append(0)
    if request.num_tokens == request.max_total_tokens:
      self.batcher.finish(row.uid, RequestStatus.FINISHED_LENGTH)
    return request

  def _add_prefill(self, row: Row, work: Work) -> None:
    """Adds a row's work, except for what follows it over the link."""
    following = self._following.get(row.uid, 0)
    start = min(max(following, row.start), row.end)
    work.copied_s += self._cost.move_s(start - row.start)
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


def _host_tier(
  instance: InstanceId, config: ClusterConfig, cost: CostModel
) -> HostTier | None:
  """Host memory of an instance; None if the policy does not rest on it."""
  if not get_policy(config.lending.policy).swaps_to_host:
    return None
  tokens_per_s = cost.prefill_tokens_per_s(config.scheduler.chunk_tokens)
  pairs_per_s = cost.prefill_pairs_per_s / cost.performance.num_layers
  costs = SwapCosts(
    block_bytes=round(config.block_size * cost.kv_bytes_per_token),
    link_bytes_per_s=cost.host_bytes_per_s,
    recompute_tokens_per_s=tokens_per_s,
    doubling_tokens=pairs_per_s / tokens_per_s,
  )
  pool = BlockPool(instance, config.host_blocks, tier=Tier.HOST)
  return HostTier(pool=pool, costs=costs)
