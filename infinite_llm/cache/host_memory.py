"""Whether this machine has the host memory that a HOST pool asks for."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from infinite_llm.errors import ConfigError

PINNED_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""Caps pinned memory of a process on GPUs; XLA reads it when JAX starts."""

_DEFAULT_PINNED_LIMIT_GIB = 64

_OTHER_PINNED_BYTES = 1 << 30
"""Margin under the cap: what else goes to and fro is pinned as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostMemory:
  """What a process can have of the machine's memory.

  Attributes:
    available_bytes: What is free now; None if the system does not tell.
    pinned_limit_bytes: Most that may be pinned; None where nothing limits it.
    num_sharing: Processes that are to have as much each of what is available.
  """

  available_bytes: int | None
  pinned_limit_bytes: int | None
  num_sharing: int = 1


def host_memory(
  environment: Mapping[str, str],
  backend: str,
  system: pathlib.Path = pathlib.Path("/"),
) -> HostMemory:
  """Asks the system.

  Args:
    environment: Variables of this process.
    backend: JAX's backend; only "gpu" limits pinned memory.
    system: Root of the file system that tells what is free.

  Raises:
    ConfigError: If the variable for the limit is no positive integer.
  """
  limit_bytes = None
  if backend == "gpu":
    limit = environment.get(
      PINNED_LIMIT_VARIABLE, str(_DEFAULT_PINNED_LIMIT_GIB)
    )
    if not limit.isdecimal() or int(limit) < 1:
      raise ConfigError(
        f"{PINNED_LIMIT_VARIABLE} must be a positive integer; got {limit!r}."
      )
    limit_bytes = int(limit) << 30
  return HostMemory(
    available_bytes=_available_bytes(system), pinned_limit_bytes=limit_bytes
  )


def count_sharing(system: pathlib.Path = pathlib.Path("/")) -> int:
  """How many processes of this JAX job have this machine's memory in common.

  All processes of the job call it; none returns before all have.

  Args:
    system: Root of the file system that tells which machine this is. Containers
      on one machine count as machines of their own.
  """
  if jax.process_count() == 1:
    return 1
  boot = (system / "proc/sys/kernel/random/boot_id").read_text("utf-8")
  container = (system / "proc/self/ns/cgroup").stat().st_ino
  digest = hashlib.sha256(f"{boot} {container}".encode()).digest()
  machine = np.frombuffer(digest, np.int32)
  machines = multihost_utils.process_allgather(machine)
  return int((machines == machine).all(axis=-1).sum())


def check_host_memory(
  num_bytes: int, name: str, value: object, memory: HostMemory
) -> None:
  """Refuses what would not fit, before anything is allocated.

  Args:
    num_bytes: Host memory that this process is to have.
    name: Argument that says so, for the message.
    value: Of that argument.
    memory: What there is.

  Raises:
    ConfigError: If they do not fit.
  """
  limit_bytes = memory.pinned_limit_bytes
  needed_bytes = num_bytes + _OTHER_PINNED_BYTES
  if limit_bytes is not None and needed_bytes > limit_bytes:
    raise ConfigError(
      f"{PINNED_LIMIT_VARIABLE} must be at least {-(-needed_bytes >> 30)} when"
      f" JAX starts, for {name}={value} ({num_bytes} bytes in this process) and"
      f" a margin of {_OTHER_PINNED_BYTES} bytes; got {limit_bytes >> 30}."
    )
  available_bytes = memory.available_bytes
  total_bytes = num_bytes * memory.num_sharing
  if available_bytes is not None and total_bytes > available_bytes:
    raise ConfigError(
      f"{name} must fit in the host memory that is available,"
      f" {available_bytes} bytes; got {value}, which takes {num_bytes} bytes in"
      f" each of {memory.num_sharing} process(es) on this machine."
    )


def _available_bytes(system: pathlib.Path) -> int | None:
  """The least of what the kernel and this process's control groups leave."""
  found = []
  try:
    lines = (system / "proc/meminfo").read_text("utf-8").splitlines()
    kib = next(x.split()[1] for x in lines if x.startswith("MemAvailable:"))
    found.append(int(kib) << 10)
  except (OSError, StopIteration):
    pass
  root = system / "sys/fs/cgroup"
  for files, folder in ((_GROUP_V2, root), (_GROUP_V1, root / "memory")):
    for path in _own_groups(system, files.controllers):
      found.append(_left_bytes(folder / path, files))
  return min((each for each in found if each is not None), default=None)


class _GroupFiles(NamedTuple):
  """What a version of control groups calls its files.

  Attributes:
    controllers: What /proc/self/cgroup has between the colons.
    limit: File of the limit, in bytes.
    usage: File of what is used, in bytes, the page cache included.
    inactive: Line of `memory.stat` with the page cache that is given up first,
      that of groups inside of it included, in bytes.
  """

  controllers: str
  limit: str
  usage: str
  inactive: str


_GROUP_V2 = _GroupFiles("", "memory.max", "memory.current", "inactive_file")
_GROUP_V1 = _GroupFiles(
  "memory",
  "memory.limit_in_bytes",
  "memory.usage_in_bytes",
  "total_inactive_file",
)

_UNLIMITED_BYTES = 1 << 62
"""Version 1 has no word for no limit, but a number larger than this."""


def _own_groups(system: pathlib.Path, controllers: str) -> list[str]:
  """This process's group and all around it, as paths under their mount.

  A container sees its own group at the mount, whatever the path says: what it
  names may not be there.
  """
  try:
    lines = (system / "proc/self/cgroup").read_text("utf-8").splitlines()
  except OSError:
    lines = []
  for _, names, path in (line.split(":", 2) for line in lines):
    if controllers in names.split(","):
      own = pathlib.PurePosixPath(path.strip("/"))
      return [str(each) for each in (own, *own.parents)]
  return ["."]


def _left_bytes(group: pathlib.Path, files: _GroupFiles) -> int | None:
  """What a group leaves; None if it is not there or has no limit.

  The kernel gives pages of files up before it refuses memory, those that were
  not read lately first. So these are not counted as used.
  """
  try:
    limit = (group / files.limit).read_text("utf-8").strip()
    usage_bytes = int((group / files.usage).read_text("utf-8"))
    if limit == "max" or int(limit) > _UNLIMITED_BYTES:
      return None
    stat = (group / "memory.stat").read_text("utf-8").splitlines()
  except OSError:
    return None
  counts = dict(line.split(maxsplit=1) for line in stat)
  used_bytes = max(usage_bytes - int(counts.get(files.inactive, 0)), 0)
  return max(int(limit) - used_bytes, 0)
