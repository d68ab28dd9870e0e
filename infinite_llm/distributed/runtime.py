"""Processes of a lending group: how they find each other and start JAX.

A process knows its number, how many there are and where process 0 listens; all
else follows. `join` is the first thing that it does: nothing of JAX may have
been used before.
"""

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Mapping

import jax

from infinite_llm.distributed.group_link import (
  LeaderLink,
  MemberLink,
  shows_loss,
)
from infinite_llm.distributed.group_messages import (
  Close,
  Hello,
  Refused,
  Welcome,
)
from infinite_llm.distributed.meeting import meet
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.distributed.transport.grpc_options import (
  GrpcOptions,
  TlsFiles,
)
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.errors import ConfigError, GroupError
from infinite_llm.scheduler.messages import GMANAGER
from infinite_llm.types import InstanceId

_PREFIX = "INFINITE_LLM_"
_JAX_PORT_OFFSET = 1
"""JAX's coordination service listens at the port after the leader's."""

_LOOK_EVERY_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions:
  """This process's place in its group.

  Attributes:
    process: Its number; process 0 leads.
    num_processes: How many there are.
    coordinator: `host:port` of process 0; the port after it is used too.
    host: Address under which the others reach this process; None finds the one
      that leads to the coordinator.
    secret: Known to all processes of the group and to nobody else; None trusts
      the network.
    tls: Certificates for mutual TLS; None talks in plain.
    start_timeout_s: How long the processes wait for each other at the start.
    silence_s: A process that is silent for so long is probed, and gone if it
      does not answer for as long again.
  """

  process: int
  num_processes: int
  coordinator: str
  host: str | None = None
  secret: bytes | None = dataclasses.field(default=None, repr=False)
  tls: TlsFiles | None = None
  start_timeout_s: float = 300.0
  silence_s: float = 5.0

  def __post_init__(self):
    if self.num_processes < 2:
      raise ConfigError(
        f"num_processes must be at least 2; got {self.num_processes}."
      )
    if not 0 <= self.process < self.num_processes:
      raise ConfigError(
        f"process must be in [0, {self.num_processes}); got {self.process}."
      )
    host, _, port = self.coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
      raise ConfigError(
        f"coordinator must be host:port; got {self.coordinator!r}."
      )
    if not 0 < int(port) < 2**16 - _JAX_PORT_OFFSET:
      raise ConfigError(
        "coordinator must have a port with another one after it; got"
        f" {self.coordinator!r}."
      )
    for name in ("start_timeout_s", "silence_s"):
      if not getattr(self, name) > 0:
        raise ConfigError(
          f"{name} must be positive; got {getattr(self, name)}."
        )

  @classmethod
  def from_environment(
    cls, environment: Mapping[str, str] = os.environ
  ) -> "GroupOptions | None":
    """Reads the environment that launchers set.

    `INFINITE_LLM_PROCESS`, `..._NUM_PROCESSES`, `..._COORDINATOR` and, if set,
    `..._HOST`, `..._SECRET`, `..._START_TIMEOUT_S` and `..._SILENCE_S`.

    Returns:
      The options; None if there is one process, or none of these is set.

    Raises:
      ConfigError: If one is missing or wrong, naming it.
    """
    names = ("PROCESS", "NUM_PROCESSES", "COORDINATOR")
    given = [name for name in names if _PREFIX + name in environment]
    if not given:
      return None
    missing = [name for name in names if name not in given]
    if missing:
      raise ConfigError(
        f"{_PREFIX}{missing[0]} must be set beside {_PREFIX}{given[0]}; it is"
        " not."
      )
    numbers = {name: _number(environment, _PREFIX + name) for name in names[:2]}
    if numbers["NUM_PROCESSES"] == 1:
      return None
    secret = environment.get(f"{_PREFIX}SECRET")
    more = {
      name.lower(): float(_number(environment, _PREFIX + name))
      for name in ("START_TIMEOUT_S", "SILENCE_S")
      if _PREFIX + name in environment
    }
    return cls(
      process=numbers["PROCESS"],
      num_processes=numbers["NUM_PROCESSES"],
      coordinator=environment[f"{_PREFIX}COORDINATOR"],
      host=environment.get(f"{_PREFIX}HOST"),
      secret=None if secret is None else secret.encode(),
      **more,
    )


_groups: list["ProcessGroup"] = []
"""The group of this process, once it has joined one: as JAX, at most one."""


def current_group() -> "ProcessGroup | None":
  """The group that this process has joined; None if it is alone."""
  return _groups[0] if _groups else None


class ProcessGroup:
  """The processes of a lending group, all there.

  Attributes:
    options: This process's place.
    transport: Carries messages between managers.
    link: To the members, or to the leader.
  """

  def __init__(
    self,
    options: GroupOptions,
    settings: Mapping[str, str],
    *,
    platform: str,
    num_instances: int,
    tensor_parallel: int,
  ):
    """Joins the group and starts JAX in it.

    Blocks until all processes are there.

    Args:
      options: This process's place.
      settings: What must be alike in all processes, by name.
      platform: "cpu" or "gpu".
      num_instances: Instances of the whole group, as many in each process.
      tensor_parallel: Devices of each.

    Raises:
      ConfigError: If the instances cannot be shared out, JAX does not run on
        the platform, or this process was started with other settings, or twice.
      GroupError: If a process is missing.
    """
    if _groups:
      raise GroupError("A process joins one group at most.")
    self.options = options
    count, rest = divmod(num_instances, options.num_processes)
    if rest or not count:
      raise ConfigError(
        "num_instances must be a multiple of num_processes, since each process"
        f" has as many; got {num_instances} with {options.num_processes}"
        " processes."
      )
    choose_platform(platform)
    if platform == "cpu":
      jax.config.update("jax_num_cpu_devices", count * tensor_parallel)
    host = options.host or _own_address(options.coordinator)
    first = options.process * count
    self.transport = GrpcTransport(
      GrpcOptions(listen=f"{host}:0", tls=options.tls, secret=options.secret)
    )
    hello = Hello(
      process=options.process,
      settings=tuple(sorted(settings.items())),
      target=f"{host}:{self.transport.port}",
      instances=tuple(range(first, first + count)),
    )
    self.link: LeaderLink | MemberLink
    try:
      if options.process == 0:
        self.link, welcome = self._lead(hello)
      else:
        self.link, welcome = self._follow(hello)
    except BaseException:
      self.transport.close()
      raise
    try:
      self._connect(welcome)

      def start() -> None:
        _start_jax(options, platform)
        meet(make_mesh(num_instances, tensor_parallel))

      _while_all_are_there(self.link, start)
    except BaseException:
      self.link.close()
      self.transport.close()
      raise
    _groups.append(self)

  @property
  def is_leader(self) -> bool:
    """Whether this is process 0."""
    return self.options.process == 0

  def process_of(self, instance: InstanceId) -> int:
    """Which process an instance belongs to."""
    return self._process_of[instance]

  def close(self) -> None:
    """Says good-bye; JAX ends with the process."""
    _groups.remove(self)
    if isinstance(self.link, LeaderLink):
      self.link.broadcast(Close())
    self.link.close()
    self.transport.close()

  def _lead(self, mine: Hello) -> tuple[LeaderLink, Welcome]:
    options = self.options
    link = LeaderLink(
      _link_options(options, options.coordinator),
      options.num_processes - 1,
      lambda hello: _difference(mine, hello),
    )
    try:
      hellos = [mine, *link.await_members(options.start_timeout_s)]
    except BaseException:
      link.close()
      raise
    welcome = Welcome(
      targets=tuple(hello.target for hello in hellos),
      instances=tuple(hello.instances for hello in hellos),
    )
    link.broadcast(welcome)
    return link, welcome

  def _follow(self, mine: Hello) -> tuple[MemberLink, Welcome]:
    options = self.options
    link = MemberLink(options.coordinator, _link_options(options, "0.0.0.0:0"))
    try:
      link.join(mine, options.start_timeout_s)
      welcome = link.next(options.start_timeout_s)
      if isinstance(welcome, Refused):
        raise ConfigError(welcome.reason)
      if not isinstance(welcome, Welcome):
        raise GroupError(f"Process 0 must say welcome first; got {welcome}.")
    except BaseException:
      link.close()
      raise
    return link, welcome

  def _connect(self, welcome: Welcome) -> None:
    self._process_of = {
      instance: process
      for process, instances in enumerate(welcome.instances)
      for instance in instances
    }
    for process, target in enumerate(welcome.targets):
      if process == self.options.process:
        continue
      for instance in welcome.instances[process]:
        self.transport.connect(instance, target)
      if process == 0:
        self.transport.connect(GMANAGER, target)


def _while_all_are_there(
  link: LeaderLink | MemberLink, meet: Callable[[], None]
) -> None:
  """Does what waits for all processes; not for one that goes meanwhile.

  Raises:
    GroupError: If one is gone. What waits for it does so on a thread that ends
      with this process: nothing of JAX may be used any more.
  """
  failed: list[BaseException] = []
  is_over = threading.Event()

  def meet_and_tell() -> None:
    try:
      meet()
    except BaseException as error:  # Raised by whoever waits.
      failed.append(error)
    finally:
      is_over.set()

  threading.Thread(target=meet_and_tell, daemon=True, name="start-jax").start()
  while not is_over.wait(_LOOK_EVERY_S) and link.lost is None:
    pass
  error = failed[0] if failed else None
  if isinstance(error, jax.errors.JaxRuntimeError) and shows_loss(link, error):
    pass  # JAX was the first to notice.
  elif error is not None:
    raise error
  elif link.lost is None:
    return
  message = f"{link.lost} JAX had not started in all processes yet."
  raise GroupError(message) from error


def _start_jax(options: GroupOptions, platform: str) -> None:
  host, _, port = options.coordinator.rpartition(":")
  jax.distributed.initialize(
    coordinator_address=f"{host}:{int(port) + _JAX_PORT_OFFSET}",
    num_processes=options.num_processes,
    process_id=options.process,
    initialization_timeout=round(options.start_timeout_s),
    shutdown_timeout_seconds=10,
  )
  check_platform(platform)


def _link_options(options: GroupOptions, listen: str) -> GrpcOptions:
  return GrpcOptions(
    listen=listen,
    tls=options.tls,
    secret=options.secret,
    keepalive_s=options.silence_s,
  )


def _difference(mine: Hello, other: Hello) -> str | None:
  """The first setting that another process has otherwise; None if none."""
  ours, theirs = dict(mine.settings), dict(other.settings)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      return (
        f"{name} must be alike in all processes; got"
        f" {ours.get(name, 'nothing')} in process 0 and"
        f" {theirs.get(name, 'nothing')} in process {other.process}."
      )
  return None


def _own_address(coordinator: str) -> str:
  """The address of the interface that leads to the coordinator."""
  host, _, port = coordinator.rpartition(":")
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host.strip("[]"), int(port), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
      probe.connect(address)  # Of datagrams: nothing is sent.
      return probe.getsockname()[0]
  except OSError as error:
    raise ConfigError(
      f"coordinator must be reachable; got {coordinator!r} ({error})."
    ) from error


def _number(environment: Mapping[str, str], name: str) -> int:
  value = environment[name]
  if not (value.isascii() and value.isdigit()):
    raise ConfigError(f"{name} must be a number; got {value!r}.")
  return int(value)
