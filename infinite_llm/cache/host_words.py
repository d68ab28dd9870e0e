"""Small arrays that devices read over the host link, past the copy engines.

A transfer of a few KB waits behind all rBlocks on their way to the device, and
so does the step whose inputs they are. On GPUs the words lie in pinned host
memory instead, and a kernel of the device's reads them when it gets there.

JAX gives pinned memory to the next array as soon as nobody holds it. That is
right for memory of a device, which programs use in the order of their launch,
but the host writes at once, whatever has been launched and is still to read.
So what was not read yet is held here.
"""

import collections
import functools
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.fetch_words.api import fetch_words


class Unread:
  """Words in host memory, until devices have read them."""

  def __init__(self):
    """Holds nothing."""
    self._lock = threading.Lock()  # Engines of one process may have threads.
    self._held = collections.deque[tuple[jax.Array, jax.Array]]()

  def __len__(self) -> int:
    """How many arrays are held."""
    return len(self._held)

  def add(self, words: jax.Array, fetched: jax.Array) -> None:
    """Holds words until what was fetched of them is there."""
    with self._lock:
      self._held.append((words, fetched))
      # JAX declares `is_ready` only for its own arrays.
      while self._held[0][1].is_ready():  # pyright: ignore[reportAttributeAccessIssue]
        self._held.popleft()
        if not self._held:
          return


unread = Unread()
"""Of all devices of this process. The last ones stay until others come."""


def put_words(words: np.ndarray, row: Mesh) -> jax.Array:
  """Puts words where the devices of an instance have them.

  Args:
    words: `[1, W]` int32.
    row: The `(1, tensor)` mesh of the instance.

  Returns:
    `[1, W]` int32 on each device, still being fetched.
  """
  sharding = NamedSharding(row, PartitionSpec(INSTANCE_AXIS))
  if not _is_far(row):
    return jax.device_put(words, sharding)
  there = jax.device_put(words, sharding.with_memory_kind("pinned_host"))
  fetched = _fetch(row)(there)
  unread.add(there, fetched)
  return fetched


def _is_far(row: Mesh) -> bool:
  """Whether a link lies between the host's memory and the devices."""
  return row.devices.flat[0].platform == "gpu"


@functools.cache
def _fetch(row: Mesh) -> Callable[[jax.Array], jax.Array]:
  spec = PartitionSpec(INSTANCE_AXIS)
  return jax.jit(
    jax.shard_map(
      fetch_words,
      mesh=row,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )
  )
