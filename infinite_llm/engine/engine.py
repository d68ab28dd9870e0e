"""The engine of a lending group: requests in, tokens out."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import jax
from absl import logging

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.admission import (
  as_token_ids,
  check_request,
  derived_seed,
  reachable_tokens,
)
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.sampler import Sampler, fetch
from infinite_llm.engine.step_launcher import LaunchedStep, StepLauncher
from infinite_llm.engine.stream import OutputStream
from infinite_llm.engine.warm_up import Progress, warm_up
from infinite_llm.errors import CapacityError, ModelError, RequestError
from infinite_llm.models.hf_loader import LoadedModel
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.types import InstanceId, PoolCounts, RequestUid

_IDLE_S = 0.0005
"""Pause of a step that finds nothing to do but wait for a message."""


@dataclasses.dataclass(kw_only=True)
class _Running:
  """What the engine keeps of a request beside the scheduler's part."""

  request: Request
  instance: InstanceId
  stream: OutputStream


class Engine:
  """Serves one model on the instances of one lending group.

  A step plans every instance on its own, launches local programs for requests
  whose rBlocks are all at home and group programs for the others, and commits
  the rows that were proved.

  Attributes:
    config: Sizes and rules.
    runner: The devices.
    group: Managers and data plane.
    batchers: Continuous batching of each instance.
    num_unproved_rows: Rows whose coverage was not what they demanded; each was
      tried again, or its request failed.
  """

  def __init__(
    self,
    model: LoadedModel,
    config: EngineConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    transport: InProcessTransport | None = None,
    attention: str | None = None,
  ):
    """Builds pools and managers around a loaded model; compiles nothing.

    Args:
      model: Parameters on a mesh of `config.num_instances` rows.
      config: Sizes and rules.
      clock: Monotonic seconds, for resends, heartbeats and stalls.
      transport: Carries the managers' messages; None makes one.
      attention: Name of the micro-attention; None picks.
    """
    self.config = config
    self._model = model
    self._clock = clock
    mesh = jax.tree.leaves(model.state)[0].sharding.mesh
    self.runner = ModelRunner(model, mesh, config, attention=attention)
    self.group = LendingGroup(
      config, self.runner, clock, transport or InProcessTransport()
    )
    self.batchers = [
      Batcher(manager, config.scheduler, config.cache.block_size)
      for manager in self.group.managers
    ]
    self._samplers = [
      Sampler(
        instance,
        row,
        self.runner.programs,
        vocab_size=model.config.vocab_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_logprobs=config.max_logprobs,
      )
      for instance, row in enumerate(self.runner.row_meshes)
    ]
    self._launcher = StepLauncher(self.runner, self.group, self._samplers)
    self.num_unproved_rows = 0
    self._uids = itertools.count(1)
    self._running: dict[RequestUid, _Running] = {}
    self._uid_of: dict[str, RequestUid] = {}
    self._finished: list[RequestOutput] = []
    self._last_step_s = clock()
    self._stalled_s = 0.0

  @property
  def capacity_tokens(self) -> int:
    """Most tokens that one request can have, over all instances."""
    return reachable_tokens(self.config)

  def warm_up(self, progress: Progress | None = None) -> None:
    """Compiles every program that the configuration can need.

    Blocks the host.

    Args:
      progress: Told how far this is.
    """
    warm_up(self.runner, self._samplers, self.config, progress)

  def add_request(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    request_id: str | None = None,
    instance: InstanceId | None = None,
  ) -> str:
    """Takes a request.

    Args:
      prompt_token_ids: Its prompt, at least one token.
      sampling: How to choose its tokens.
      request_id: Its name, unique among unfinished requests; None makes one.
      instance: Which instance owns it; None takes the least loaded one.

    Returns:
      The request's name.

    Raises:
      RequestError: If an argument is wrong; nothing else is disturbed.
      CapacityError: If the prompt can never fit.
    """
    uid = next(self._uids)
    if request_id is None:
      request_id = self._unused_name(uid)
    prompt = as_token_ids(prompt_token_ids)
    if request_id in self._uid_of:
      raise RequestError(
        f"request_id must be unique among unfinished requests; got"
        f" {request_id!r} again."
      )
    self.check(prompt, sampling, instance=instance)
    if instance is None:
      instance = self._least_loaded()
    if sampling.seed is None:
      seed = derived_seed(self.config.seed, uid)
      sampling = dataclasses.replace(sampling, seed=seed)
    request = Request(
      uid=uid,
      request_id=request_id,
      prompt_token_ids=prompt,
      sampling=sampling,
      arrival=uid,
      max_total_tokens=min(
        len(prompt) + sampling.max_tokens, self.capacity_tokens
      ),
    )
    self._running[uid] = _Running(
      request=request,
      instance=instance,
      stream=OutputStream(
        request, self._model.tokenizer, self._model.generation, instance
      ),
    )
    self._uid_of[request_id] = uid
    self.batchers[instance].add(request)
    return request_id

  def check(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    instance: InstanceId | None = None,
  ) -> None:
    """Refuses what `add_request` would refuse, and changes nothing.

    Raises:
      RequestError: If an argument is wrong.
      CapacityError: If the prompt can never fit.
    """
    check_request(
      as_token_ids(prompt_token_ids),
      sampling,
      instance,
      self.config,
      self._model.config.vocab_size,
    )
    if sampling.stop and self._model.tokenizer is None:
      raise RequestError(
        "stop must be empty, since the checkpoint has no tokenizer.json; got"
        f" {sampling.stop!r}."
      )

  def abort(self, request_id: str) -> None:
    """Ends a request early; its rBlocks are given back.

    Args:
      request_id: Its name. One that is already finished is left alone.
    """
    uid = self._uid_of.get(request_id)
    if uid is not None:
      self.batchers[self._running[uid].instance].abort(uid)
      self._close(uid, "abort", None)

  def has_unfinished(self) -> bool:
    """Whether any request has not ended."""
    return bool(self._running) or bool(self._finished)

  def settle(self) -> bool:
    """Lets the managers finish what they are about; `step` begins with it.

    Returns:
      Whether rBlocks were moved or proved.
    """
    return self.group.settle(self._proved_tokens)

  def step(self) -> list[RequestOutput]:
    """Advances every instance by one step.

    Returns:
      Outputs of the requests that got a token or ended.
    """
    has_moved = self.settle()
    plans = [batcher.plan() for batcher in self.batchers]
    # A plan may give a request up and let another take its place at once.
    self._take_failed()
    launched = self._launcher.launch(plans, self._request)
    for step in launched:
      self._commit(step)
    self._take_failed()
    if has_moved or launched or not self._running:
      self._stalled_s = 0.0
    else:
      self._break_stall()
    self._last_step_s = self._clock()
    outputs, self._finished = self._finished, []
    return outputs

  def progress(self, request_id: str) -> tuple[int, int]:
    """How far the prompt of a request is computed.

    Returns:
      `(computed, total)` prompt tokens; all of them once it is finished.
    """
    uid = self._uid_of.get(request_id)
    if uid is None:
      return 1, 1
    request = self._running[uid].request
    total = len(request.prompt_token_ids)
    return min(request.num_computed_tokens, total), total

  def pool_counts(self) -> list[PoolCounts]:
    """How the rBlocks of each instance are used."""
    return [manager.counts() for manager in self.group.managers]

  def _request(self, uid: RequestUid) -> Request:
    return self._running[uid].request

  def _commit(self, launched: LaunchedStep) -> None:
    """Advances the proved rows of a step, and only those."""
    batcher = self.batchers[launched.instance]
    result = fetch(launched.pending)
    for b, row in enumerate(launched.rows):
      if row.uid not in self._running:
        continue
      if not result["proved"][b]:
        self.num_unproved_rows += 1
        logging.warning(
          "Request %s: what its step read is not what it demanded; trying"
          " again.",
          self._running[row.uid].request.request_id,
        )
        self._samplers[launched.instance].forget(row.uid)
        batcher.row_failed(row)
        continue
      batcher.advance(row)
      if row.samples:
        self._append(row.uid, {name: x[b] for name, x in result.items()})

  def _append(self, uid: RequestUid, sampled) -> None:
    running = self._running[uid]
    reason = running.stream.push(sampled)
    if reason is None:
      self._finished.append(running.stream.output(None))
      return
    if reason == "error":
      error = ModelError(
        f"Request {running.request.request_id}: the model gave logits that are"
        f" no distribution at token {running.request.num_tokens}: a NaN, or"
        " nothing finite."
      )
      self.batchers[running.instance].fail(uid, error)
      return
    status = (
      RequestStatus.FINISHED_LENGTH
      if reason == "length"
      else RequestStatus.FINISHED_STOPPED
    )
    self.batchers[running.instance].finish(uid, status)
    self._close(uid, reason, None)

  def _close(
    self, uid: RequestUid, reason: str, error: Exception | None
  ) -> None:
    running = self._running.pop(uid)
    del self._uid_of[running.request.request_id]
    self._samplers[running.instance].forget(uid)
    self._finished.append(running.stream.output(reason, error))

  def _take_failed(self) -> None:
    """Reports requests that the scheduler gave up."""
    failed = [
      uid
      for uid, running in self._running.items()
      if running.request.status is RequestStatus.FAILED
    ]
    for uid in failed:
      self._close(uid, "error", self._running[uid].request.error)

  def _break_stall(self) -> None:
    """Makes room when nothing can go on and no message is awaited.

    Requests of several instances may wait for each other's rBlocks. The
    youngest running one gives its own up and is computed again later, so the
    oldest always gets through. One that is alone fails, but much later: it may
    be waiting for messages that are lost again and again.
    """
    running = [
      running
      for running in self._running.values()
      if running.request.status is RequestStatus.RUNNING
    ]
    lending = self.config.lending
    round_s = max(lending.resend_after_s, lending.heartbeat_every_s)
    patience_s = round_s * (3 if len(running) > 1 else 30)
    # Time in which nobody called `step` is no stall: messages waited as well.
    self._stalled_s += min(self._clock() - self._last_step_s, round_s)
    if self._stalled_s < patience_s:
      time.sleep(_IDLE_S)
      return
    self._stalled_s = 0.0
    if len(running) > 1:
      youngest = max(running, key=lambda r: r.request.arrival)
      logging.warning(
        "All requests wait for rBlocks; %s gives its own up.",
        youngest.request.request_id,
      )
      self.batchers[youngest.instance].preempt(youngest.request.uid)
      return
    stuck = min(
      running or self._running.values(), key=lambda r: r.request.arrival
    )
    error = CapacityError(
      f"Request {stuck.request.request_id} needs room for"
      f" {stuck.request.num_tokens + 1} tokens, which nobody gives up:"
      f" {self.pool_counts()}."
    )
    self.batchers[stuck.instance].fail(stuck.request.uid, error)
    self._take_failed()

  def _proved_tokens(self, uid: RequestUid) -> int:
    return self._running[uid].request.num_computed_tokens

  def _unused_name(self, uid: RequestUid) -> str:
    """A name for a request without one; callers may have used any."""
    name = f"request-{uid}"
    while name in self._uid_of:
      name += "-"
    return name

  def _least_loaded(self) -> InstanceId:
    """The instance whose requests have the fewest tokens; first of equals."""
    load = [0] * len(self.batchers)
    for running in self._running.values():
      load[running.instance] += running.request.num_tokens
    return load.index(min(load))
