"""Whether this machine has the host memory that a HOST pool asks for."""

import dataclasses
import pathlib
from collections.abc import Mapping

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
  """

  available_bytes: int | None
  pinned_limit_bytes: int | None


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
  if available_bytes is not None and num_bytes > available_bytes:
    raise ConfigError(
      f"{name} must fit in the host memory that is available,"
      f" {available_bytes} bytes; got {value}, which takes {num_bytes} bytes in"
      " this process."
    )


def _available_bytes(system: pathlib.Path) -> int | None:
  """The least of what the kernel and this process's own group leave."""
  found = []
  try:
    lines = (system / "proc/meminfo").read_text("utf-8").splitlines()
    kib = next(x.split()[1] for x in lines if x.startswith("MemAvailable:"))
    found.append(int(kib) << 10)
  except (OSError, StopIteration):
    pass
  try:
    group = system / "sys/fs/cgroup"
    limit = (group / "memory.max").read_text("utf-8").strip()
    used = int((group / "memory.current").read_text("utf-8"))
    if limit != "max":
      found.append(max(int(limit) - used, 0))
  except OSError:
    pass
  return min(found, default=None)
