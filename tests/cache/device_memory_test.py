import dataclasses

import jax
import pytest

from infinite_llm.cache import device_memory
from infinite_llm.cache.device_memory import DeviceMemory, free_bytes
from infinite_llm.cache.host_memory import HostMemory


@dataclasses.dataclass
class FakeDevice:
  stats: dict[str, int] | None
  platform: str = "gpu"

  def memory_stats(self):
    return self.stats


def test_the_fullest_device_counts():
  devices = [
    FakeDevice({"bytes_limit": 100, "bytes_in_use": used}) for used in (10, 70)
  ]
  assert free_bytes(devices) == 30
  assert device_memory.device_memory(devices) == [
    DeviceMemory(limit_bytes=100, in_use_bytes=10),
    DeviceMemory(limit_bytes=100, in_use_bytes=70),
  ]


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 1}])
def test_of_devices_that_do_not_tell_nothing_is_known(stats):
  told = FakeDevice({"bytes_limit": 100, "bytes_in_use": 0})
  assert free_bytes([told, FakeDevice(stats)]) is None


@pytest.mark.parametrize(("available", "each"), [(1000, 250), (None, None)])
def test_cpu_devices_share_the_machine(monkeypatch, available, each):
  monkeypatch.setattr(
    device_memory,
    "host_memory",
    lambda *_: HostMemory(available_bytes=available, pinned_limit_bytes=None),
  )
  assert free_bytes(jax.devices("cpu")[:4]) == each
