"""The links to host memory of several devices at once, in the data plane bench.

What bounds a context that lies in host memory: each instance streams its part
over its device's link, all at the same time.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import SingleDeviceSharding


def bench(
  config: ml_collections.ConfigDict, num_devices: int
) -> Iterator[dict[str, Any]]:
  """Times transfers each way, of one device and of more at once.

  Args:
    config: See `configs/data_plane_bench.py`; reads `links`.
    num_devices: Devices to use at most.

  Yields:
    Rows of the bench; `gb_per_s` is of each link.
  """
  rng = np.random.default_rng(config.seed)
  arrays = [
    rng.integers(2**32, size=config.links.bytes // 4, dtype=np.uint32)
    for _ in range(config.links.arrays)
  ]
  counts = [n for n in (1, 2, 4, 8) if n <= num_devices]
  for way in ("to HBM", "to HOST"):
    links = [_Link(device, way, arrays) for device in jax.devices()]
    for count in counts:
      together = links[:count]
      times_s = [_time_s(together) for _ in range(1 + config.repeats)][1:]
      time_s = statistics.median(times_s)
      sizes = {link.num_bytes for link in together}
      yield {
        "part": "links",
        "way": way,
        "devices": count,
        "bytes": sizes.pop(),
        "arrays": len(arrays),
        "time_ms": time_s * 1e3,
        "gb_per_s": links[0].num_bytes / time_s / 1e9,
        "correct": all(link.is_right(arrays) for link in together),
      }


class _Link:
  """Arrays at one end of a device's link, to be copied to the other.

  Attributes:
    num_bytes: Of all of them.
  """

  def __init__(
    self, device: jax.Device, way: str, arrays: Sequence[np.ndarray]
  ):
    hbm = SingleDeviceSharding(device)
    host = hbm.with_memory_kind("pinned_host")
    source, self._target = (host, hbm) if way == "to HBM" else (hbm, host)
    self._arrays = jax.block_until_ready(jax.device_put(list(arrays), source))
    self._copies: Sequence[jax.Array] = ()
    self.num_bytes = sum(array.nbytes for array in arrays)

  def begin(self) -> Sequence[jax.Array]:
    """Starts to copy all; what was copied before makes room for it."""
    self._copies = ()
    self._copies = jax.device_put(self._arrays, self._target, may_alias=False)
    return self._copies

  def is_right(self, arrays: Sequence[np.ndarray]) -> bool:
    """Whether the last copies are what they should be."""
    return all(
      np.array_equal(copy, array)
      for copy, array in zip(self._copies, arrays, strict=True)
    )


def _time_s(links: Sequence[_Link]) -> float:
  """Seconds until all links have copied all."""
  started_s = time.perf_counter()
  jax.block_until_ready([link.begin() for link in links])
  return time.perf_counter() - started_s
