"""The engine of a lending group: requests in, tokens out."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.admission import (
  as_token_ids,
  check_request,
  derived_seed,
  reachable_tokens,
)
from infinite_llm.engine.in_flight import (
  Flight,
  InFlight,
  IsReady,
  LaunchedStep,
  is_computed,
)
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.pool_size import with_pool_size
from infinite_llm.engine.request_book import Entry, RequestBook
from infinite_llm.engine.sampler import Sampler, fetch
from infinite_llm.engine.stall import StallBreaker
from infinite_llm.engine.step_launcher import GROUP_PREFILL, StepLauncher
from infinite_llm.engine.stream import OutputStream
from infinite_llm.engine.warm_up import Progress, warm_up
from infinite_llm.errors import ModelError, RequestError
from infinite_llm.models.hf_loader import LoadedModel
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.step_plan import StepPlan
from infinite_llm.types import InstanceId, PoolCounts, RequestUid


class Engine:
  """Serves one model on the instances of one lending group.

  Each instance is planned on its own and has one step under way at most: local
  programs for requests whose rBlocks are all at home, and its part of a group
  program for the others. Instances do not wait for each other unless a group
  program joins them. Rows that were proved are committed, and only those.

  Attributes:
    config: Sizes and rules; that of the pools is known.
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
    transport: Transport | None = None,
    attention: str | None = None,
    is_ready: IsReady = is_computed,
  ):
    """Builds pools and managers around a loaded model.

    Compiles nothing, unless the size of the pools is left to be measured.

    Args:
      model: Parameters on a mesh of `config.num_instances` rows.
      config: Sizes and rules.
      clock: Monotonic seconds, for resends, heartbeats and stalls.
      transport: Carries the managers' messages; None makes one.
      attention: Name of the micro-attention; None picks.
      is_ready: Tells whether a step is over, where several are under way.
    """
    self.config = config = with_pool_size(model, config, attention=attention)
    self._model = model
    self._clock = clock
    self.runner = ModelRunner(model, config, attention=attention)
    self.group = LendingGroup(
      config, self.runner, clock, transport or InProcessTransport()
    )
    self.batchers = [
      Batcher(
        manager, config.scheduler, config.lending, config.cache.block_size
      )
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
    self._launcher = StepLauncher(
      self.runner, self.group, self._samplers, clock
    )
    self._in_flight = InFlight(is_ready)
    self.num_unproved_rows = 0
    self._uids = itertools.count(1)
    self._book = RequestBook(config.num_instances)
    self._finished: list[RequestOutput] = []
    self._stall = StallBreaker(config.lending, clock, self._book, self.batchers)

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
    self.group.host_tiers.warm_up()
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
      request_id = self._book.unused_name(uid)
    prompt = as_token_ids(prompt_token_ids)
    if self._book.find(request_id) is not None:
      raise RequestError(
        f"request_id must be unique among unfinished requests; got"
        f" {request_id!r} again."
      )
    self.check(prompt, sampling, instance=instance)
    if instance is None:
      instance = self._book.least_loaded()
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
    stream = OutputStream(
      request, self._model.tokenizer, self._model.generation, instance
    )
    self._book.add(Entry(request=request, instance=instance, stream=stream))
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
    entry = self._book.find(request_id)
    if entry is not None:
      # A row of it that is under way finds nobody when it is committed.
      self.batchers[entry.instance].abort(entry.request.uid)
      self._take_ended()

  def has_unfinished(self) -> bool:
    """Whether any request has not ended."""
    return bool(self._book) or bool(self._finished)

  def settle(self) -> bool:
    """Lets the managers finish what they are about; `step` begins with it.

    Returns:
      Whether rBlocks were moved or proved.
    """
    return self.group.settle(self._proved_tokens)

  def step(self) -> list[RequestOutput]:
    """Launches a step of every idle instance and waits for any to be over.

    After an exception from a launch or a commit, and after a
    `KeyboardInterrupt` while it waits, it can be called again: what was not
    committed is fetched or computed once more, and gives the same tokens.

    Returns:
      Outputs of the requests that got a token or ended.
    """
    has_moved = self.settle()
    self._launch()
    # A plan may give a request up and let another take its place at once.
    self._take_ended()
    flights = self._in_flight.wait()
    for flight in flights:
      self._commit(flight)
    self._take_ended()
    if has_moved or flights or not self._book:
      self._stall.progress()
    else:
      self._stall.wait()
      self._take_ended()
    outputs, self._finished = self._finished, []
    return outputs

  def is_unfinished(self, request_id: str) -> bool:
    """Whether a request of this name has not ended."""
    return self._book.find(request_id) is not None

  def progress(self, request_id: str) -> tuple[int, int]:
    """How far the prompt of a request is computed.

    Returns:
      `(computed, total)` prompt tokens; all of them once it is finished.
    """
    entry = self._book.find(request_id)
    if entry is None:
      return 1, 1
    total = len(entry.request.prompt_token_ids)
    return min(entry.request.num_computed_tokens, total), total

  def pool_counts(self) -> list[PoolCounts]:
    """How the rBlocks of each instance are used."""
    return [batcher.pool_counts() for batcher in self.batchers]

  def _request(self, uid: RequestUid) -> Request:
    return self._book[uid].request

  def _launch(self) -> None:
    """Launches what the idle instances can do now."""
    plans = [
      batcher.plan() if self._may_launch(instance) else StepPlan()
      for instance, batcher in enumerate(self.batchers)
    ]
    try:
      self._in_flight.add(self._launcher.launch(plans, self._request))
    except BaseException:
      # Rows launched so far are planned again. They write the same KV, but the
      # samplers must not take their tokens for seen.
      for instance, plan in enumerate(plans):
        for row in plan.rows:
          self._samplers[instance].forget(row.uid)
      raise

  def _may_launch(self, instance: InstanceId) -> bool:
    if self._in_flight.holds(instance):
      return False
    # On every device one group program runs after the other. Rows that need
    # one are better off together in the next than in one of their own behind
    # the one under way.
    return not (
      self._in_flight.has_group and self.batchers[instance].has_spilled
    )

  def _commit(self, flight: Flight) -> None:
    """Advances the rows of a flight. Blocks the host until they are there."""
    results = [fetch(step.pending) for step in flight.steps]
    now_s = self._clock()
    self._in_flight.remove(flight)
    try:
      for step, result in zip(flight.steps, results, strict=True):
        self._commit_step(step, result, now_s)
    except BaseException:
      self._recompute(flight)
      raise

  def _commit_step(
    self, step: LaunchedStep, result: Mapping[str, np.ndarray], now_s: float
  ) -> None:
    """Advances the proved rows of a step that was over at `now_s`."""
    batcher = self.batchers[step.instance]
    for b, row in enumerate(step.rows):
      # Only the step that plans an instance preempts there, and only this one
      # ends a request unasked: a row under way is that of a running request,
      # or of one that was aborted.
      if row.uid not in self._book:
        continue
      if step.kind == GROUP_PREFILL:
        # What it waited for on the devices counts: others wait for that too.
        duration_s = now_s - step.launched_s
        self._request(row.uid).group_token_s = duration_s / row.num_tokens
      if not result["proved"][b]:
        self.num_unproved_rows += 1
        logging.warning(
          "Request %s: what its step read is not what it demanded; trying"
          " again.",
          self._request(row.uid).request_id,
        )
        self._samplers[step.instance].forget(row.uid)
        batcher.row_failed(row)
        continue
      batcher.advance(row)
      if row.samples:
        self._append(row.uid, {name: x[b] for name, x in result.items()})

  def _recompute(self, flight: Flight) -> None:
    """Begins requests anew whose rows were perhaps committed by half."""
    for step in flight.steps:
      for row in step.rows:
        if (
          row.uid in self._book
          and self._request(row.uid).status is RequestStatus.RUNNING
        ):
          self._samplers[step.instance].forget(row.uid)
          self.batchers[step.instance].preempt(row.uid)

  def _append(self, uid: RequestUid, sampled: Mapping[str, np.ndarray]) -> None:
    entry = self._book[uid]
    batcher = self.batchers[entry.instance]
    status = entry.stream.push(sampled)
    if status is RequestStatus.FAILED:
      error = ModelError(
        f"Request {entry.request.request_id}: the model gave logits that are"
        f" no distribution at token {entry.request.num_tokens}: a NaN, or"
        " nothing finite."
      )
      batcher.fail(uid, error)
      return
    self._book.note_token(uid)
    if status is None:
      self._finished.append(entry.stream.output(None))
    else:
      batcher.finish(uid, status)

  def _take_ended(self) -> None:
    """Reports requests that ended, and forgets them."""
    for instance, batcher in enumerate(self.batchers):
      while (request := batcher.take_ended()) is not None:
        self._samplers[instance].forget(request.uid)
        stream = self._book.remove(request.uid).stream
        self._finished.append(
          stream.output(request.status.finish_reason, request.error)
        )

  def _proved_tokens(self, uid: RequestUid) -> int:
    return self._book[uid].request.num_computed_tokens
