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
  """Words in host memory, until the devices of an instance have read them.

  They are read in the order in which they came. The last ones stay until others
  come.
  """

  def __init__(self):
    """Holds nothing."""
    self._lock = threading.Lock()  # Engines of one process may have threads.
    self._held = collections.deque[tuple[jax.Array, jax.Array]]()

  def __len__(self) -> int:
    """How many arrays are held."""
    return len(self._held)

  def add(self, words: jax.Array, fetched: jax.Array) -> None:
    """Holds words until what was fetched of them is there.

    Args:
      words: In host memory.
      fetched: What programs are given; not to be donated to any.
    """
    with self._lock:
      self._held.append((words, fetched))
      while self._held and _is_there(self._held[0][1]):
        self._held.popleft()


def _is_there(array: jax.Array) -> bool:
  # JAX declares `is_ready` only for its own arrays.
  return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


_unread: dict[Mesh, Unread] = {}


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
  _unread.setdefault(row, Unread()).add(there, fetched)
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
