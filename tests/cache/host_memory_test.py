import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from infinite_llm.cache.host_memory import (
  HostMemory,
  check_host_memory,
  count_sharing,
  host_memory,
)
from infinite_llm.errors import ConfigError

GIB = 1 << 30


@pytest.fixture(name="system")
def _system(tmp_path):
  """Root of a system with 8 GiB available."""
  (tmp_path / "proc").mkdir()
  (tmp_path / "proc/meminfo").write_text(
    "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"
  )
  return tmp_path


_NO_LIMIT_V1 = 9223372036854771712


def _limit_group(system, limit, used, inactive=0, path=""):
  """Makes a control group of version 2."""
  group = system / "sys/fs/cgroup" / path
  group.mkdir(parents=True, exist_ok=True)
  (group / "memory.max").write_text(f"{limit}\n")
  (group / "memory.current").write_text(f"{used}\n")
  (group / "memory.stat").write_text(
    f"anon 4096\nfile {used}\ninactive_file {inactive}\nactive_file 77\n"
  )


def _limit_group_v1(system, limit, used, inactive=0, path=""):
  group = system / "sys/fs/cgroup/memory" / path
  group.mkdir(parents=True, exist_ok=True)
  (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
  (group / "memory.usage_in_bytes").write_text(f"{used}\n")
  (group / "memory.stat").write_text(
    f"cache {used}\ninactive_file 7\ntotal_inactive_file {inactive}\n"
  )


def _put_into(system, *lines):
  """Says which groups the process is in."""
  (system / "proc/self").mkdir()
  (system / "proc/self/cgroup").write_text("".join(f"{x}\n" for x in lines))


def test_what_the_kernel_calls_available_counts(system):
  assert host_memory({}, "cpu", system) == HostMemory(
    available_bytes=8 * GIB, pinned_limit_bytes=None
  )


def test_less_is_available_in_a_limited_group(system):
  _limit_group(system, 5 * GIB, 2 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 3 * GIB


@pytest.mark.parametrize("limit_group", [_limit_group, _limit_group_v1])
def test_files_that_are_kept_until_memory_is_short_are_available(
  system, limit_group
):
  limit_group(system, 5 * GIB, 4 * GIB, inactive=3 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 4 * GIB


@pytest.mark.parametrize("limit_group", [_limit_group, _limit_group_v1])
def test_a_group_that_has_more_than_the_machine_leaves_that(
  system, limit_group
):
  limit_group(system, 50 * GIB, 2 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 8 * GIB


def test_less_is_available_in_a_limited_group_of_version_1(system):
  _limit_group_v1(system, 5 * GIB, 2 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 3 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(system):
  _limit_group(system, 2 * GIB, 3 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 0


def test_the_narrowest_group_around_the_process_counts(system):
  _put_into(system, "5:cpu,cpuacct:/else", "0::/job/step")
  _limit_group(system, 6 * GIB, 2 * GIB, path="job")
  _limit_group(system, "max", 1 * GIB, path="job/step")
  _limit_group(system, 1 * GIB, 0, path="other")
  assert host_memory({}, "cpu", system).available_bytes == 4 * GIB


def test_the_narrowest_group_of_version_1_counts(system):
  _put_into(system, "4:cpuset,memory:/job/step", "1:name=systemd:/", "0::/")
  _limit_group_v1(system, _NO_LIMIT_V1, 9 * GIB)
  _limit_group_v1(system, 6 * GIB, 2 * GIB, path="job/step")
  assert host_memory({}, "cpu", system).available_bytes == 4 * GIB


def test_a_container_has_its_group_at_the_mount(system):
  _put_into(system, "4:memory:/docker/0123")
  _limit_group_v1(system, 6 * GIB, 2 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 4 * GIB


def test_a_group_without_limit_changes_nothing(system):
  _limit_group(system, "max", 2 * GIB)
  _limit_group_v1(system, _NO_LIMIT_V1, 2 * GIB)
  assert host_memory({}, "cpu", system).available_bytes == 8 * GIB


def test_no_limit_of_version_1_is_no_number(tmp_path):
  _limit_group_v1(tmp_path, _NO_LIMIT_V1, 2 * GIB)
  assert host_memory({}, "cpu", tmp_path).available_bytes is None


def test_a_system_that_does_not_tell_is_not_asked_again(tmp_path):
  assert host_memory({}, "cpu", tmp_path).available_bytes is None


def test_gpus_pin_64_gib_unless_told_otherwise(system):
  name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
  assert host_memory({}, "gpu", system).pinned_limit_bytes == 64 * GIB
  memory = host_memory({name: "200"}, "gpu", system)
  assert memory.pinned_limit_bytes == 200 * GIB


@pytest.mark.parametrize("value", ["", "0", "-3", "4.5", "many"])
def test_a_limit_that_is_no_number_is_refused(system, value):
  name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
  with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
    host_memory({name: value}, "gpu", system)


def test_pools_that_fit_are_allowed():
  memory = HostMemory(available_bytes=64 * GIB, pinned_limit_bytes=64 * GIB)
  check_host_memory(63 * GIB, "host_blocks", 8065, memory)
  unknown = HostMemory(available_bytes=None, pinned_limit_bytes=None)
  check_host_memory(63 * GIB, "host_blocks", 8065, unknown)


def test_a_pinned_limit_that_is_too_small_is_named():
  memory = HostMemory(available_bytes=200 * GIB, pinned_limit_bytes=64 * GIB)
  with pytest.raises(
    ConfigError,
    match=(
      r"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB must be at least 66 when JAX starts,"
      rf" for host_blocks=8321 \({65 * GIB} bytes in this process\).*; got 64\."
    ),
  ):
    check_host_memory(65 * GIB, "host_blocks", 8321, memory)


def test_processes_of_one_machine_share_it():
  memory = HostMemory(
    available_bytes=8 * GIB, pinned_limit_bytes=64 * GIB, num_sharing=4
  )
  check_host_memory(2 * GIB, "host_blocks", 257, memory)
  with pytest.raises(
    ConfigError, match=rf"{3 * GIB} bytes in each of 4 process\(es\) on this"
  ):
    check_host_memory(3 * GIB, "host_blocks", 385, memory)


def test_those_of_the_same_machine_are_counted(tmp_path, monkeypatch):
  """Of five processes two others run here, one of them in a container."""

  def machine(name, boot):
    system = tmp_path / name
    (system / "proc/self/ns").mkdir(parents=True)
    (system / "proc/self/ns/cgroup").touch()
    (system / "proc/sys/kernel/random").mkdir(parents=True)
    (system / "proc/sys/kernel/random/boot_id").write_text(boot)
    return system

  here, container, far = (
    machine(name, boot) for name, boot in (("a", "x"), ("b", "x"), ("c", "y"))
  )
  told = []
  monkeypatch.setattr(jax, "process_count", lambda: 5)
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda x: told.append(x) or x[None]
  )
  assert [count_sharing(system) for system in (here, container, far)] == [1] * 3
  others = np.stack([told[0], told[0], told[1], told[2], told[0]])
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: others)
  counts = [count_sharing(system) for system in (here, container, far)]
  assert counts == [3, 1, 1]


def test_a_process_that_is_alone_asks_nobody():
  assert count_sharing() == 1


def test_too_little_memory_is_named():
  memory = HostMemory(available_bytes=8 * GIB, pinned_limit_bytes=None)
  with pytest.raises(
    ConfigError,
    match=rf"host_blocks must fit .* {8 * GIB} bytes; got 1281, which takes",
  ):
    check_host_memory(10 * GIB, "host_blocks", 1281, memory)
