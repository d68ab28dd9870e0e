"""An engine without a model: real batchers over a `FakeCluster`."""

from infinite_llm.config import SchedulerConfig
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.step_plan import Row
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster


def make_request(
  uid: int, num_tokens: int, *, max_tokens: int = 4, arrival: int | None = None
) -> Request:
  return Request(
    uid=uid,
    request_id=f"request-{uid}",
    prompt_token_ids=tuple(range(num_tokens)),
    sampling=SamplingParams(max_tokens=max_tokens),
    arrival=uid if arrival is None else arrival,
    max_total_tokens=num_tokens + max_tokens,
  )


class FakeEngine:
  """Plans, computes and commits as `engine/engine.py` does."""

  def __init__(self, cluster: FakeCluster, scheduler: SchedulerConfig):
    self.cluster = cluster
    self.batchers = [
      Batcher(manager, scheduler, cluster.lending, BLOCK_SIZE)
      for manager in cluster.managers
    ]
    self.requests: dict[int, Request] = {}
    self.num_failed_rows = 0

  def add(self, instance: int, request: Request) -> Request:
    self.requests[request.uid] = request
    self.batchers[instance].add(request)
    return request

  @property
  def has_work(self) -> bool:
    return any(batcher.has_work for batcher in self.batchers)

  def step(self, seconds: float = 0.2) -> int:
    """One step of all instances; returns how many rows were proved."""
    cluster = self.cluster
    cluster.tick(seconds)
    cluster.proved = {
      uid: request.num_computed_tokens for uid, request in self.requests.items()
    }
    cluster.settle()
    plans = [batcher.plan() for batcher in self.batchers]
    cluster.check()
    launched = [
      (instance, row, self._compute(instance, row))
      for instance, plan in enumerate(plans)
      for row in plan.rows
    ]
    for instance, row, is_proved in launched:
      self._commit(instance, row, is_proved)
    return sum(is_proved for *_, is_proved in launched)

  def run(self, max_steps: int = 2000) -> None:
    """Steps until all requests have ended."""
    for _ in range(max_steps):
      if not self.has_work:
        self.cluster.heartbeat()
        return
      self.step()
    raise AssertionError(f"Still running: {self.requests}")

  def _compute(self, instance: int, row: Row) -> bool:
    self.cluster.write(instance, row.uid, row.start, row.end)
    return self.cluster.covers(instance, row.uid, row.end)

  def _commit(self, instance: int, row: Row, is_proved: bool) -> None:
    batcher = self.batchers[instance]
    request = self.requests[row.uid]
    if not is_proved:
      self.num_failed_rows += 1
      batcher.row_failed(row)
      return
    batcher.advance(row)
    self.cluster.proved[row.uid] = request.num_computed_tokens
    if row.samples:
      request.output_token_ids.append(row.end)
      if request.num_tokens == request.max_total_tokens:
        batcher.finish(row.uid, RequestStatus.FINISHED_LENGTH)
