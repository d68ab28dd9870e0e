"""The engine of a lending group: requests in, tokens out."""

import itertools
import time
from collections.abc import Callable, Sequence

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.group_messages import EngineUse, InstanceBlocks
from infinite_llm.distributed.step_header import (
  GroupOrder,
  OwnOrder,
  StepHeader,
)
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.admission import (
  as_token_ids,
  check_request,
  new_request,
  reachable_tokens,
)
from infinite_llm.engine.in_flight import Flight, InFlight, IsReady, is_computed
from infinite_llm.engine.layered_steps import LayeredSteps
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.news import blocks_of, use_of
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.pool_size import with_pool_size
from infinite_llm.engine.request_book import Entry, RequestBook
from infinite_llm.engine.sampler import Sampler
from infinite_llm.engine.stall import StallBreaker
from infinite_llm.engine.step_committer import StepCommitter
from infinite_llm.engine.step_launcher import StepLauncher
from infinite_llm.engine.step_planner import StepPlanner
from infinite_llm.engine.stream import OutputStream
from infinite_llm.engine.warm_up import Progress, warm_up
from infinite_llm.errors import RequestError
from infinite_llm.models.hf_loader import LoadedModel
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.step_plan import StepPlan
from infinite_llm.types import InstanceId, PoolCounts, RequestUid


class Engine:
  """Serves one model on this process's instances of one lending group.

  Each instance is planned on its own, when nothing of it is under way: local
  programs for requests whose rBlocks are all at home, and its part of a group
  program for the others, with those that just decode. While all are at home a
  local step is also planned behind the one under way. Instances do not wait for
  each other unless a group program joins them. Only proved rows are committed.

  With more processes than this one, each has an engine of its own; what they
  launch together they agree on by turns (`distributed/step_header.py`).

  Attributes:
    config: Sizes and rules; that of the pools is known.
    runner: The devices.
    group: Managers and data plane.
    instances: Numbers of this process's instances.
    batchers: Continuous batching of each of them.
    stall: Makes room when nothing goes on.
  """

  def __init__(
    self,
    model: LoadedModel,
    config: EngineConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    transport: Transport | None = None,
    order: GroupOrder | None = None,
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
      order: Agrees on group programs with other processes; None if there are
        none.
      attention: Name of the micro-attention; None picks.
      is_ready: Tells whether a step or a check is over, where it matters.
    """
    self.config = config = with_pool_size(model, config, attention=attention)
    self._model = model
    self._clock = clock
    self.runner = ModelRunner(model, config, attention=attention)
    self.instances = self.runner.instances
    self._order = order or OwnOrder(config.lending.group_prefill_buckets[-1])
    self.group = LendingGroup(
      config,
      self.runner,
      clock,
      transport or InProcessTransport(),
      self._order,
      is_ready,
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
      for instance, row in zip(
        self.instances, self.runner.row_meshes, strict=True
      )
    ]
    layered = None
    if config.cache.host_attention:
      tiers = self.group.host_tiers
      layered = LayeredSteps(
        model, config, self.runner, tiers, attention, self.group.renew
      )
    self._launcher = StepLauncher(
      self.runner, self.group, self._samplers, clock, layered
    )
    self._in_flight = InFlight(is_ready)
    self._book = RequestBook(self.instances)
    self._planner = StepPlanner(
      config, self.group, self._order, self._in_flight, self.batchers, clock
    )
    self._committer = StepCommitter(
      self._book,
      self._in_flight,
      self.instances,
      self.batchers,
      self._samplers,
      clock,
    )
    self._uids = itertools.count(1)
    self._finished: list[RequestOutput] = []
    self.stall = StallBreaker(
      config.lending,
      clock,
      self._book,
      self.instances,
      self.batchers,
      is_shared=self._order.is_shared,
    )

  @property
  def num_unproved_rows(self) -> int:
    """Rows of wrong coverage; each was tried again, or its request failed."""
    return self._committer.num_unproved_rows

  @property
  def capacity_tokens(self) -> int:
    """Most tokens that one request can have, over all instances."""
    return reachable_tokens(self.config)

  def warm_up(self, progress: Progress | None = None) -> None:
    """Compiles every program that may be needed; blocks the host.

    Args:
      progress: Told how far this is.
    """
    self._launcher.warm_up()
    warm_up(self.runner, self._samplers, self.config, progress)

  def add_request(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    request_id: str | None = None,
    instance: InstanceId | None = None,
    uid: RequestUid | None = None,
  ) -> str:
    """Takes a request.

    Args:
      prompt_token_ids: Its prompt, at least one token.
      sampling: How to choose its tokens.
      request_id: Its name, unique among unfinished requests; None makes one.
      instance: Which instance owns it; None takes the least loaded one.
      uid: Its number, never used before in the whole group; None takes the
        next one.

    Returns:
      The request's name.

    Raises:
      RequestError: If an argument is wrong; nothing else is disturbed.
      CapacityError: If the prompt can never fit.
    """
    uid = next(self._uids) if uid is None else uid
    if request_id is None:
      request_id = self._book.unused_name(uid)
    prompt = as_token_ids(prompt_token_ids)
    self.check(prompt, sampling, instance=instance)
    if instance is None:
      instance = self._book.least_loaded()
    return self.accept(
      prompt, sampling, request_id=request_id, instance=instance, uid=uid
    )

  def accept(
    self,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    *,
    request_id: str,
    instance: InstanceId,
    uid: RequestUid,
  ) -> str:
    """Takes a request that was checked; arguments as of `add_request`."""
    if self._book.find(request_id) is not None:
      raise RequestError(
        f"request_id must be unique among unfinished requests; got"
        f" {request_id!r} again."
      )
    request = new_request(uid, request_id, prompt, sampling, self.config)
    stream = OutputStream(
      request, self._model.tokenizer, self._model.generation, instance
    )
    self._book.add(Entry(request=request, instance=instance, stream=stream))
    self._batcher(instance).add(request)
    return request_id

  def check(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    instance: InstanceId | None = None,
  ) -> None:
    """Refuses what `add_request` would refuse, and changes nothing."""
    check_request(
      as_token_ids(prompt_token_ids),
      sampling,
      instance,
      self.config,
      self._model.config.vocab_size,
      has_tokenizer=self._model.tokenizer is not None,
    )

  def abort(self, request_id: str) -> None:
    """Ends a request early; its rBlocks are given back.

    Args:
      request_id: Its name. One that is already finished is left alone.
    """
    entry = self._book.find(request_id)
    if entry is not None:
      # A row of it that is under way finds nobody when it is committed.
      self._batcher(entry.instance).abort(entry.request.uid)
      self._take_ended()

  def has_unfinished(self) -> bool:
    """Whether any request has not ended."""
    return bool(self._book) or bool(self._finished)

  @property
  def is_computing(self) -> bool:
    """Whether a step is under way."""
    return bool(self._in_flight)

  def settle(self) -> bool:
    """Lets the managers go on with what they are about; launches no step.

    Returns:
      Whether rBlocks were moved or proved.
    """
    # A turn may have to wait for them; the next step returns their tokens.
    self._commit(self._in_flight.wait(at_once=True))
    self.group.tick()
    has_moved = self.group.talk(self._in_flight.has_long_on)
    turn = None if self._order.is_shared else self._planner.next_turn()
    return self._move(turn) or has_moved

  def step(
    self, meanwhile: Callable[[], bool] | None = None
  ) -> list[RequestOutput]:
    """Launches steps of all instances and waits for any to be over.

    After an exception from a launch or a commit, and after a
    `KeyboardInterrupt` while it waits, it can be called again: what was not
    committed is fetched or computed once more, and gives the same tokens.

    Args:
      meanwhile: Called when steps are launched, so that it costs devices no
        time; whether something must not wait for a step to be over.

    Returns:
      Outputs of the requests that got a token or ended.
    """
    has_moved = self.group.talk(self._in_flight.has_long_on)
    turn = self._planner.next_turn()
    has_moved |= self._move(turn)
    self._launch(lambda: self._planner.plans(turn), turn)
    self._planner.launched(turn)
    self._launch(self._planner.plans_behind, None)
    self.group.tick()  # Now it costs devices no time, nor do gRPC's threads.
    # A plan may give a request up and let another take its place at once.
    self._take_ended()
    is_hurried = meanwhile is not None and meanwhile()
    flights = self._in_flight.wait(
      self._planner.interruption(), at_once=is_hurried
    )
    self._commit(flights)
    has_rows = self._in_flight.has_rows or any(each.steps for each in flights)
    if has_moved or has_rows or not self._book or self.group.is_checking:
      self.stall.progress()
    else:
      self.stall.wait()
      self._take_ended()
    outputs, self._finished = self._finished, []
    return outputs

  def is_unfinished(self, request_id: str) -> bool:
    """Whether a request of this name has not ended."""
    return self._book.find(request_id) is not None

  def progress(self, request_id: str) -> tuple[int, int]:
    """Prompt tokens of a request, `(computed, total)`; equal once it ended."""
    return self._book.progress(request_id)

  def pool_counts(self) -> list[PoolCounts]:
    """How the rBlocks of each instance are used."""
    return [batcher.pool_counts() for batcher in self.batchers]

  def use(self) -> EngineUse:
    """How the instances are used now, and what was done so far."""
    unproved, rounds = self.num_unproved_rows, self.stall.rounds
    return use_of(self.group, self.batchers, self.runner, unproved, rounds)

  def give_up(self, uid: RequestUid, *, is_alone: bool) -> None:
    """Has a request of a stalled group give its rBlocks up.

    Args:
      uid: The request; nothing happens if it ended or any row is under way.
      is_alone: Whether nobody else has any, so that it cannot go on.
    """
    if not self._in_flight.has_rows:
      self.stall.give_up(uid, is_alone=is_alone)
      self._take_ended()

  def blocks(self) -> tuple[InstanceBlocks, ...]:
    """What lies in every rBlock."""
    return blocks_of(self.group, self.batchers)

  def _move(self, turn: StepHeader | None) -> bool:
    """Launches the part of a turn that is no step."""
    if turn is None:
      return False
    self._order.take(turn)
    return self.group.move(turn, self._book.proved_tokens)

  def _launch(
    self, plan: Callable[[], Sequence[StepPlan]], turn: StepHeader | None
  ) -> None:
    """Launches a step of each instance that has rows in its plan."""
    plans: Sequence[StepPlan] = ()
    try:
      plans = plan()
      flights = self._launcher.launch(plans, turn, self._book.request)
      self._in_flight.add(flights)
    except BaseException:
      # Rows launched so far are planned again. They write the same KV, but the
      # samplers must not take their tokens for seen.
      self._planner.hold()
      for own, each in enumerate(plans):
        for row in each.rows:
          self._samplers[own].forget(row.uid)
      raise

  def _commit(self, flights: Sequence[Flight]) -> None:
    """Commits flights that are over."""
    for flight in flights:
      self._finished += self._committer.commit(flight)
    self._take_ended()

  def _take_ended(self) -> None:
    """Reports requests that ended, and forgets them."""
    for sampler, batcher in zip(self._samplers, self.batchers, strict=True):
      while (request := batcher.take_ended()) is not None:
        sampler.forget(request.uid)
        reason = request.status.finish_reason
        stream = self._book.remove(request.uid).stream
        self.stall.ended(request.uid)
        self._finished.append(stream.output(reason, request.error))

  def _batcher(self, instance: InstanceId) -> Batcher:
    return self.batchers[self.instances.index(instance)]
