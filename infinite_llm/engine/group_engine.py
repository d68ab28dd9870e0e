"""The engines of several processes as one: requests go in at process 0."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence

from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.group_link import LeaderLink, MemberLink
from infinite_llm.distributed.group_messages import (
  Abort,
  Ask,
  Blocks,
  BlocksRequest,
  Close,
  EngineUse,
  Failed,
  FromLeader,
  InstanceBlocks,
  Open,
  Outputs,
  Submit,
  Turn,
)
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.runtime import ProcessGroup
from infinite_llm.distributed.shared_order import LeaderOrder, MemberOrder
from infinite_llm.engine.admission import as_token_ids, derived_seed
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.news import RemoteRequest, news_of, together
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.warm_up import Progress
from infinite_llm.errors import GroupError, RequestError
from infinite_llm.models.checkpoint import is_checkpoint, restore
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import InstanceId, PoolCounts

_PATIENCE_S = 120.0
_IDLE_S = 0.0005
_REPORT_EVERY_S = 0.02


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
    self._order = LeaderOrder(group.link, _PATIENCE_S)
    self._own = Engine(
      model, config, transport=group.transport, order=self._order
    )
    self.config = self._own.config
    self._uids = itertools.count(1)
    self._load = dict.fromkeys(range(config.num_instances), 0)
    self._remote: dict[str, RemoteRequest] = {}
    self._outputs: list[RequestOutput] = []
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
      return self._own.add_request(
        prompt, sampling, request_id=request_id, instance=instance, uid=uid
      )
    self._remote[request_id] = RemoteRequest(
      request_id, instance, prompt, sampling
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
    request = self._remote.pop(request_id, None)
    if request is None:
      self._own.abort(request_id)
      return
    # What its owner still says of it is of no request any more.
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
    return request_id in self._remote or self._own.is_unfinished(request_id)

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
    request = self._remote.get(request_id)
    if request is None:
      return self._own.progress(request_id)
    total = len(request.prompt_token_ids)
    done = [
      computed
      for use in self._uses.values()
      for name, computed in use.progress
      if name == request_id
    ]
    return min(max(done, default=0), total), total

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
    """One step of this process, between two looks at the link."""
    self._hear()
    outputs = self._own.step()
    for output in outputs:
      if output.is_finished:
        self._note_end(output)
      else:
        self._outputs.append(output)
    has_heard = self._hear()
    if not (outputs or has_heard):
      time.sleep(_IDLE_S)
    return bool(outputs) or has_heard

  def _hear(self) -> bool:
    """Takes what members have said."""
    messages = self._link.receive()
    for process, message in messages:
      match message:
        case Ask():
          self._order.on_ask(process, message)
        case Outputs(news=news):
          for each in news:
            request = self._remote.get(each.request_id)
            if request is None:
              continue
            output = request.take(each)
            if output.is_finished:
              del self._remote[each.request_id]
              self._note_end(output)
            else:
              self._outputs.append(output)
        case EngineUse():
          self._uses[process] = message
        case Blocks(instances=instances):
          self._blocks[process] = instances
        case Failed(reason=reason):
          raise GroupError(f"Process {process} failed: {reason}")
        case _:
          raise GroupError(f"Process {process} must not say {message}.")
    return bool(messages)

  def _note_end(self, output: RequestOutput) -> None:
    self._load[output.instance] -= len(output.prompt_token_ids)
    self._outputs.append(output)


def say_open(
  group: ProcessGroup, model: str | os.PathLike[str], config: EngineConfig
) -> None:
  """Has members load a model and build their engines, beside process 0."""
  if isinstance(group.link, LeaderLink):
    text = json.dumps(dataclasses.asdict(config))
    group.link.broadcast(Open(model=os.fspath(model), config=text))


def load_model(
  model: str | os.PathLike[str], config: EngineConfig
) -> LoadedModel:
  """Loads a checkpoint onto the mesh that a configuration asks for.

  Args:
    model: Hugging Face folder, or one that `models.checkpoint.save` wrote.
    config: How many instances, of how many devices, and the dtype.

  Raises:
    ConfigError: If there are too few devices.
    CheckpointError: If the checkpoint cannot be read.
  """
  mesh = make_mesh(config.num_instances, config.tensor_parallel)
  load = restore if is_checkpoint(model) else load_hf
  dtype = None if config.dtype == "auto" else config.dtype
  return load(model, mesh, dtype=dtype)


class Member:
  """What any other process does: it runs its instances, as process 0 asks."""

  def __init__(self, group: ProcessGroup):
    """Waits for `run`."""
    if not isinstance(group.link, MemberLink):
      raise GroupError("Process 0 is no member.")
    self._group = group
    self._link = group.link
    self._engine: Engine | None = None
    self._order: MemberOrder | None = None
    self._said: EngineUse | None = None
    self._reported_s = 0.0

  def run(self) -> None:
    """Serves until process 0 says that it is over.

    Raises:
      GroupError: If process 0 is gone.
    """
    with self._telling():
      while self._hear():
        has_spoken = self._engine is not None and self._step(self._engine)
        if not has_spoken:
          time.sleep(_IDLE_S)

  @contextlib.contextmanager
  def _telling(self) -> Iterator[None]:
    """Tells process 0 what went wrong here."""
    try:
      yield
    except GroupError:
      raise
    except Exception as error:
      self._link.send(Failed(reason=f"{type(error).__name__}: {error}"))
      raise

  def _hear(self) -> bool:
    """Takes what process 0 said; False if it is over."""
    for message in self._link.receive():
      match message:
        case Open(model=model, config=text):
          self._open(model, _config(text))
        case Close():
          return False
        case _:
          self._take(message)
    return True

  def _open(self, model: str, config: EngineConfig) -> None:
    self._engine = None  # Its pools go before the new ones come.
    self._order = MemberOrder(self._link, _PATIENCE_S)
    self._engine = Engine(
      load_model(model, config),
      config,
      transport=self._group.transport,
      order=self._order,
    )
    self._engine.warm_up()
    self._said = None  # So that process 0 hears of it.

  def _take(self, message: FromLeader) -> None:
    engine, order = self._engine, self._order
    if engine is None or order is None:
      raise GroupError(f"There is no engine yet for {message}.")
    match message:
      case Turn():
        order.on_turn(message)
      case Submit():
        engine.add_request(
          message.prompt,
          message.sampling,
          request_id=message.request_id,
          instance=message.instance,
          uid=message.uid,
        )
      case Abort(request_id=request_id):
        engine.abort(request_id)
      case BlocksRequest():
        self._link.send(Blocks(instances=engine.blocks()))
      case _:
        raise GroupError(f"Process 0 must not say {message}.")

  def _step(self, engine: Engine) -> bool:
    """One step; whether it gave anything."""
    outputs = engine.step()
    if outputs:
      self._link.send(Outputs(news=tuple(map(news_of, outputs))))
    now_s = time.monotonic()
    if now_s - self._reported_s >= _REPORT_EVERY_S:
      self._reported_s = now_s
      use = engine.use()
      if use != self._said:
        self._said = use
        self._link.send(use)
    return bool(outputs)


def _config(text: str) -> EngineConfig:
  """The configuration of `say_open`."""
  document = json.loads(text)
  parts = [document.pop(name) for name in ("cache", "lending", "scheduler")]
  return engine_config(**document, **parts[0], **parts[1], **parts[2])
