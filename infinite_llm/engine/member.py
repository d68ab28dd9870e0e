"""What the other processes of a group do: they run their instances."""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator

from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.group_link import LeaderLink, MemberLink
from infinite_llm.distributed.group_messages import (
  Abort,
  Blocks,
  BlocksRequest,
  Call,
  Close,
  ComeBack,
  EngineUse,
  Failed,
  FromLeader,
  GiveUp,
  Open,
  Submit,
  Turn,
)
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.runtime import ProcessGroup
from infinite_llm.distributed.shared_order import MemberOrder
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.news import outputs_of
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.stall import REPORT_EVERY_S
from infinite_llm.errors import GroupError
from infinite_llm.models.checkpoint import is_checkpoint, restore
from infinite_llm.models.dummy_weights import load_dummy
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.models.loaded_model import LoadedModel

PATIENCE_S = 120.0
"""How long the steps of a turn may take; longer is a fault."""

_IDLE_S = 0.0005


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
    model: Hugging Face folder, or one that `models.checkpoint.save` wrote. For
      `load_format="dummy"` one with a Hugging Face `config.json`.
    config: How many instances, of how many devices, the dtype, and whether
      weights are read or drawn.

  Raises:
    ConfigError: If there are too few devices.
    CheckpointError: If the checkpoint cannot be read.
  """
  mesh = make_mesh(config.num_instances, config.tensor_parallel)
  dtype = None if config.dtype == "auto" else config.dtype
  if config.load_format == "dummy":
    return load_dummy(model, mesh, seed=config.seed, dtype=dtype)
  load = restore if is_checkpoint(model) else load_hf
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
    self._outputs: list[RequestOutput] = []
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
        if not (has_spoken or self._has_mail()):
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

  def _has_mail(self) -> bool:
    """Whether process 0, or another manager, has said something."""
    return self._link.has_mail() or self._group.transport.has_mail()

  def _open(self, model: str, config: EngineConfig) -> None:
    self._engine = None  # Its pools go before the new ones come.
    self._outputs.clear()
    self._order = MemberOrder(self._link, PATIENCE_S, config)
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
      case Call():
        order.on_call(message)
      case Turn():
        order.on_turn(message)
      case Submit():
        engine.accept(
          message.prompt,
          message.sampling,
          request_id=message.request_id,
          instance=message.instance,
          uid=message.uid,
        )
      case Abort(request_id=request_id):
        engine.abort(request_id)
      case GiveUp(uid=uid, is_alone=is_alone):
        engine.give_up(uid, is_alone=is_alone)
      case ComeBack(uid=uid):
        engine.stall.come_back(uid)
      case BlocksRequest():
        self._link.send(Blocks(instances=engine.blocks()))
      case _:
        raise GroupError(f"Process 0 must not say {message}.")

  def _step(self, engine: Engine) -> bool:
    """One step; whether it gave anything.

    What it gave is told while the devices compute: at once if a step is under
    way, and else when the next one is launched.
    """
    self._outputs += engine.step(functools.partial(self._tell, engine))
    has_spoken = bool(self._outputs)
    if has_spoken and engine.is_computing:
      self._tell(engine)
    return has_spoken

  def _tell(self, engine: Engine) -> bool:
    """Tells process 0 what there is; nothing is ever in a hurry."""
    if self._outputs:
      self._link.send(outputs_of(self._outputs))
      self._outputs.clear()
    now_s = time.monotonic()
    if now_s - self._reported_s >= REPORT_EVERY_S:
      self._reported_s = now_s
      use = engine.use()
      if use != self._said:
        self._said = use
        self._link.send(use)
    return False


def _config(text: str) -> EngineConfig:
  """The configuration of `say_open`."""
  document = json.loads(text)
  parts = [document.pop(name) for name in ("cache", "lending", "scheduler")]
  return engine_config(**document, **parts[0], **parts[1], **parts[2])
