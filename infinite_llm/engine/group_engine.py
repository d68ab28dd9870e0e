"""The engines of several processes as one: requests go in at process 0."""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.group_link import LeaderLink
from infinite_llm.distributed.group_messages import (
  Abort,
  Ask,
  Blocks,
  BlocksRequest,
  ComeBack,
  EngineUse,
  Failed,
  GiveUp,
  InstanceBlocks,
  Outputs,
  Ready,
  Submit,
)
from infinite_llm.distributed.runtime import ProcessGroup
from infinite_llm.distributed.shared_order import LeaderOrder
from infinite_llm.engine.admission import as_token_ids, derived_seed
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.member import PATIENCE_S
from infinite_llm.engine.news import RemoteRequest, together
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.warm_up import Progress
from infinite_llm.errors import GroupError, RequestError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.stalls import StandingAside, who_gives_up
from infinite_llm.types import InstanceId, PoolCounts, RequestUid

_IDLE_S = 0.0005
_LOOK_EVERY_S = 0.1


class GroupEngine:
  """What process 0 serves with: its own engine, and those of the members.

  Has the methods of `Engine`; requests for another process's instance travel
  there, and their outputs come back.

  Attributes:
    config: Sizes and rules; that of the pools is known.
  """

  def __init__(
    self, model: LoadedModel, config: EngineConfig, group: ProcessGroup
  ):
    """Builds this process's engine; members build theirs at the same time.

    Args:
      model: Parameters on the mesh of the whole group.
      config: Sizes and rules of the whole group.
      group: All processes. It said `Open` to the members.
    """
    if not isinstance(group.link, LeaderLink):
      raise GroupError("Only process 0 takes requests.")
    self._group = group
    self._link = group.link
    self._order = LeaderOrder(
      group.link, PATIENCE_S, config, group.options.num_processes
    )
    self._own = Engine(
      model, config, transport=group.transport, order=self._order
    )
    self.config = self._own.config
    self._uids = itertools.count(1)
    self._load = dict.fromkeys(range(config.num_instances), 0)
    self._remote: dict[RequestUid, RemoteRequest] = {}
    self._remote_uids: dict[str, RequestUid] = {}
    self._outputs: list[RequestOutput] = []
    self._has_heard_first = False
    self._looked_s = 0.0
    self._aside = StandingAside()
    self._uses: dict[int, EngineUse] = {}
    self._blocks: dict[int, tuple[InstanceBlocks, ...]] = {}

  @property
  def capacity_tokens(self) -> int:
    """Most tokens that one request can have, over all instances."""
    return self._own.capacity_tokens

  def warm_up(self, progress: Progress | None = None) -> None:
    """Compiles every program. Blocks until all members have done so too."""
    self._own.warm_up(progress)
    while len(self._uses) + 1 < self._group.options.num_processes:
      if not self._hear():
        time.sleep(_IDLE_S)

  def add_request(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    request_id: str | None = None,
    instance: InstanceId | None = None,
  ) -> str:
    """Takes a request, as `Engine.add_request` does."""
    uid = next(self._uids)
    prompt = as_token_ids(prompt_token_ids)
    if request_id is None:
      request_id = f"request-{uid}"
      while self.is_unfinished(request_id):
        request_id += "-"
    elif self.is_unfinished(request_id):
      raise RequestError(
        f"request_id must be unique among unfinished requests; got"
        f" {request_id!r} again."
      )
    self.check(prompt, sampling, instance=instance)
    if instance is None:
      instance = min(self._load, key=self._load.__getitem__)
    if sampling.seed is None:
      seed = derived_seed(self.config.seed, uid)
      sampling = dataclasses.replace(sampling, seed=seed)
    self._load[instance] += len(prompt)
    if instance in self._own.instances:
      return self._own.accept(
        prompt, sampling, request_id=request_id, instance=instance, uid=uid
      )
    self._remote_uids[request_id] = uid
    self._remote[uid] = RemoteRequest(
      uid, request_id, instance, prompt, sampling
    )
    self._link.send(
      self._group.process_of(instance),
      Submit(
        uid=uid,
        request_id=request_id,
        instance=instance,
        prompt=prompt,
        sampling=sampling,
      ),
    )
    return request_id

  def check(
    self,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    instance: InstanceId | None = None,
  ) -> None:
    """Refuses what `add_request` would refuse, and changes nothing."""
    self._own.check(prompt_token_ids, sampling, instance=instance)

  def abort(self, request_id: str) -> None:
    """Ends a request early; its rBlocks are given back."""
    uid = self._remote_uids.get(request_id)
    if uid is None:
      self._own.abort(request_id)
      return
    # What its owner still says of it is of no request any more.
    request = self._forget(uid)
    self._link.send(
      self._group.process_of(request.instance), Abort(request_id=request_id)
    )
    self._note_end(request.ended("abort"))

  def has_unfinished(self) -> bool:
    """Whether any request has not ended."""
    return (
      self._own.has_unfinished() or bool(self._remote) or bool(self._outputs)
    )

  def is_unfinished(self, request_id: str) -> bool:
    """Whether a request of this name has not ended."""
    return request_id in self._remote_uids or self._own.is_unfinished(
      request_id
    )

  def settle(self) -> bool:
    """Lets the managers go on; others may need this process for that."""
    return self._go_on()

  def step(self) -> list[RequestOutput]:
    """Goes on with this process's requests, and hears of the others'.

    Returns:
      Outputs of the requests that got a token or ended.

    Raises:
      GroupError: If a process is gone.
    """
    self._go_on()
    outputs, self._outputs = self._outputs, []
    return outputs

  def progress(self, request_id: str) -> tuple[int, int]:
    """How far the prompt of a request is computed, by the newest report."""
    uid = self._remote_uids.get(request_id)
    if uid is None:
      return self._own.progress(request_id)
    request = self._remote[uid]
    total = len(request.prompt_token_ids)
    done = [
      computed
      for use in self._uses.values()
      for name, computed in use.progress
      if name == request_id
    ]
    return max(done, default=total if request.has_token else 0), total

  def pool_counts(self) -> list[PoolCounts]:
    """How the rBlocks of each instance are used, by the newest reports."""
    return [each.counts for each in self.use().instances]

  def use(self) -> EngineUse:
    """How all instances are used, by the newest reports."""
    return together([self._own.use(), *self._uses.values()])

  def blocks(self) -> tuple[InstanceBlocks, ...]:
    """What lies in every rBlock of all instances.

    Blocks until all members have told.
    """
    self._blocks.clear()
    self._link.broadcast(BlocksRequest())
    own = self._own.blocks()
    while len(self._blocks) + 1 < self._group.options.num_processes:
      self._go_on()
    return own + tuple(
      each for process in sorted(self._blocks) for each in self._blocks[process]
    )

  def _go_on(self) -> bool:
    """One step of this process, with a look at the link in it and around it."""
    # To launch a long prompt takes milliseconds, for which no caller of another
    # instance should wait; but a step must come of every other call.
    has_heard = not self._has_heard_first and self._hear()
    self._has_heard_first = has_heard and bool(self._outputs)
    if self._has_heard_first:
      return True
    outputs = self._own.step(self._hear_meanwhile)
    for output in outputs:
      if output.is_finished:
        self._note_end(output)
      else:
        self._outputs.append(output)
    has_heard |= self._hear()
    if not (outputs or has_heard):
      self._break_stall()
      if not self._group.transport.has_mail():
        time.sleep(_IDLE_S)
    return bool(outputs) or has_heard

  def _hear_meanwhile(self) -> bool:
    """Takes what members have said while devices compute.

    Returns:
      Whether there is something for the caller, who must not wait for a step.
    """
    self._hear()
    return bool(self._outputs)

  def _break_stall(self) -> None:
    """Has a request make room if no process of the group can go on."""
    now_s = time.monotonic()
    is_idle = not (self._remote or self._own.has_unfinished())
    if is_idle or now_s - self._looked_s < _LOOK_EVERY_S:
      return
    self._looked_s = now_s
    own = self._own.use()
    use = together([own, *self._uses.values()])
    # Reports of members do not know what ended since.
    known = {*own.running, *self._remote}
    running = [uid for uid in use.running if uid in known]
    uid = who_gives_up(running, use.waiting, use.stalled_rounds)
    if uid is None:
      return
    is_alone = len(running) <= 1
    if not is_alone:
      self._aside.add(uid, running)
    # Every process counts anew; until they say so, their reports are old.
    for process, each in self._uses.items():
      self._uses[process] = dataclasses.replace(each, stalled_rounds=0)
      self._link.send(process, GiveUp(uid=uid, is_alone=is_alone))
    self._own.give_up(uid, is_alone=is_alone)

  def _hear(self) -> bool:
    """Takes what members have said."""
    messages = self._link.receive()
    for process, message in messages:
      match message:
        case Ask():
          self._order.on_ask(process, message)
        case Ready():
          self._order.on_ready(process, message)
        case Outputs():
          self._take_outputs(message)
        case EngineUse():
          self._uses[process] = message
        case Blocks(instances=instances):
          self._blocks[process] = instances
        case Failed(reason=reason):
          raise GroupError(f"Process {process} failed: {reason}")
        case _:
          raise GroupError(f"Process {process} must not say {message}.")
    return bool(messages)

  def _take_outputs(self, message: Outputs) -> None:
    """Takes what a member's step gave; nothing of requests that were ended."""
    columns = message.uids, message.token_ids, message.texts
    for uid, token_id, text in zip(*columns, strict=True):
      request = self._remote.get(uid)
      if request is not None:
        self._outputs.append(request.take_token(token_id, text))
    for news in message.news:
      request = self._remote.get(news.uid)
      if request is None:
        continue
      output = request.take(news)
      if output.is_finished:
        self._forget(news.uid)
        self._note_end(output)
      else:
        self._outputs.append(output)

  def _forget(self, uid: RequestUid) -> RemoteRequest:
    """Another process's request has ended; its name is free again."""
    request = self._remote.pop(uid)
    del self._remote_uids[request.request_id]
    return request

  def _note_end(self, output: RequestOutput) -> None:
    for uid in self._aside.ended(output.uid):
      self._link.broadcast(ComeBack(uid=uid))
      self._own.stall.come_back(uid)
    self._load[output.instance] -= len(output.prompt_token_ids)
    self._outputs.append(output)
