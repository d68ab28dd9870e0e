"""What memory the devices of this process have left."""

import dataclasses
import os
from collections.abc import Sequence

import jax

from infinite_llm.cache.host_memory import host_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
  """What a device says of its memory.

  Attributes:
    limit_bytes: What this process may have of it.
    in_use_bytes: What it has.
  """

  limit_bytes: int
  in_use_bytes: int


def device_memory(devices: Sequence[jax.Device]) -> list[DeviceMemory] | None:
  """Asks devices of this process for their memory; None if one cannot tell."""
  memories = []
  for device in devices:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
      return None
    memories.append(
      DeviceMemory(
        limit_bytes=stats["bytes_limit"], in_use_bytes=stats["bytes_in_use"]
      )
    )
  return memories


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
  """How much each of some devices of this process can have at the same time.

  Args:
    devices: Of one platform. CPU devices share the machine's memory.

  Returns:
    The least that one has left; None if nobody can tell.
  """
  memories = device_memory(devices)
  if memories is not None:
    return min(memory.limit_bytes - memory.in_use_bytes for memory in memories)
  if any(device.platform != "cpu" for device in devices):
    return None
  available_bytes = host_memory(os.environ, "cpu").available_bytes
  return None if available_bytes is None else available_bytes // len(devices)
