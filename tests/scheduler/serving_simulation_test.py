"""Whole runs of several instances under seeded faults, all of them to the end.

Messages are lost, repeated and delayed, tags are overwritten and requests are
aborted at random; a row is committed only if its coverage is what it demands.
"""

import random

import pytest

from infinite_llm.config import SchedulerConfig
from infinite_llm.errors import CoverageError
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.types import Tier
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster
from tests.scheduler.fake_engine import FakeEngine, make_request

_SEEDS = 40
_PATIENCE_STEPS = 200
_MAX_STEPS = 5000


class Network:
  """Loses, repeats and delays messages with given probabilities."""

  def __init__(self, rng, *, lost, repeated, delayed):
    self._rng = rng
    self._lost = lost
    self._repeated = repeated
    self._delayed = delayed
    self._late = []

  def __call__(self, envelope):
    arriving = []
    if self._late and self._rng.random() < 0.5:
      arriving.append(self._late.pop(self._rng.randrange(len(self._late))))
    fate = self._rng.random()
    if fate < self._lost:
      return arriving
    if fate < self._lost + self._delayed:
      self._late.append(envelope)
      return arriving
    if fate < self._lost + self._delayed + self._repeated:
      arriving.append(envelope)
    return [*arriving, envelope]


class Run:
  """One seed: a random cluster, random requests, random faults."""

  def __init__(self, seed, policy=None):
    rng = self.rng = random.Random(seed)
    self.num_instances = rng.randint(1, 4)
    self.num_blocks = rng.choice((7, 12, 20))
    network = Network(
      rng,
      lost=rng.choice((0.0, 0.1, 0.3)),
      repeated=rng.choice((0.0, 0.2)),
      delayed=rng.choice((0.0, 0.1)),
    )
    self.cluster = FakeCluster(
      self.num_instances,
      self.num_blocks,
      interceptor=network,
      spill_slots=rng.choice((1, 2, 4)),
      policy=policy or rng.choice(("borrow", "borrow", "borrow", "static")),
      host_blocks=rng.choice((4, 9, 30)) if policy == "swap" else 0,
      group_prefill_buckets=(16, 64),
    )
    self.engine = FakeEngine(
      self.cluster,
      SchedulerConfig(
        max_num_seqs=rng.choice((2, 4)),
        decode_buckets=(4,),
        prefill_buckets=(rng.choice((16, 64)),),
        prefill_rows=2,
      ),
    )
    self.corruption = rng.choice((0.0, 0.05))
    self.num_idle_steps = 0
    self.has_host = self.cluster.host_blocks > 0

  def go(self):
    num_requests = self.rng.randint(1, 30 if self.has_host else 7)
    for _ in range(_MAX_STEPS):
      if not (num_requests or self.engine.has_work):
        return
      if num_requests and self.rng.random() < 0.3:
        self._add_request(num_requests)
        num_requests -= 1
      self._disturb()
      self.num_idle_steps = 0 if self.engine.step() else self.num_idle_steps + 1
      if self.num_idle_steps > _PATIENCE_STEPS:
        self._break_stall()
    raise AssertionError(f"Still running after {_MAX_STEPS} steps.")

  def _add_request(self, uid):
    own = (self.num_blocks - 1) * BLOCK_SIZE
    is_shared = self.cluster.lending.policy == "borrow"
    reachable = own * (self.num_instances if is_shared else 1)
    # Requests that grow much make others give way.
    max_tokens = self.rng.randint(1, 40 if self.has_host else 20)
    longest = reachable if self.rng.random() < 0.4 else own // 3
    num_tokens = self.rng.randint(1, max(longest - max_tokens, 1))
    self.engine.add(
      self.rng.randrange(self.num_instances),
      make_request(uid, num_tokens, max_tokens=max_tokens, arrival=100 - uid),
    )

  def _disturb(self):
    if self.has_host:
      self.cluster.is_copying = self.rng.random() < 0.6
    if self.rng.random() < self.corruption:
      device = self.rng.choice(self.cluster.devices)
      tier = self.rng.choice(list(Tier)) if self.has_host else Tier.HBM
      tags = device.tags(tier)
      tags[self.rng.randrange(1, len(tags))] = 0
    if self.rng.random() < (0.05 if self.has_host else 0.01):
      batcher = self.rng.choice(self.engine.batchers)
      requests = (*batcher.waiting, *batcher.running)
      if requests:
        batcher.abort(self.rng.choice(requests).uid)
        self.num_idle_steps = 0

  def _break_stall(self):
    """As `Engine` does: requests may wait for each other's rBlocks."""
    self.num_idle_steps = 0
    running = [
      (request.arrival, request.uid, batcher)
      for batcher in self.engine.batchers
      for request in batcher.running
    ]
    assert len(running) > 1, "A request that is alone never got its rBlocks."
    _, uid, batcher = max(running, key=lambda entry: entry[0])
    batcher.preempt(uid)


@pytest.mark.parametrize("seed", range(_SEEDS))
@pytest.mark.parametrize("policy", [None, "swap"])
def test_every_request_ends_and_nothing_is_leaked(seed, policy):
  run = Run(seed, policy)
  run.go()

  run.cluster.is_copying = True
  for _ in range(60):  # long enough for every message to get through
    run.cluster.heartbeat()
  run.cluster.check_agreement()
  run.cluster.check_empty()
  for request in run.engine.requests.values():
    assert request.status.is_finished
    if request.status is RequestStatus.FINISHED_LENGTH:
      assert request.num_tokens == request.max_total_tokens
    if request.status is RequestStatus.FAILED:
      assert isinstance(request.error, CoverageError)
      assert run.corruption > 0
