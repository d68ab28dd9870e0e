"""Compiles for a Hopper GPU on a machine that has none.

Only `make test-sm90a` runs these tests: they need CUDA's compilers, which it
puts into an environment of their own.
"""

import functools
import os
import re

import jax
import pytest
from jax.experimental import topologies

# The assembler's own words are what some tests read.
jax.config.update("jax_enable_compilation_cache", False)

# What XLA must know of an H200 to compile for it.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4814259200000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150121545728
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
device_description_str: "NVIDIA H200"
"""
# Elsewhere the folder is as good as empty.
collect_ignore_glob = (
  [] if os.environ.get("MOSAIC_GPU_DUMP_PTXAS") == "1" else ["*_test.py"]
)

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")

_BRANCH_OR_LOOP = re.compile(r" (conditional|while)\(")

_SHAPED = re.compile(r"(%[\w.-]+) = ([a-z0-9]+\[[\d,]*\])")
_SLICE = re.compile(r"(%\S+ = \S+ slice\((%[\w.-]+)\), slice={([^}]*)})")


class Sm90a:
  """Compiles programs for an H200 and reads what the assembler said.

  Attributes:
    devices: Those that it compiles for, of one process.
    said: What the assembler said when it compiled last.
  """

  def __init__(self, capfd, num_devices=1):
    self._capfd = capfd
    self.said = ""
    topology = topologies.get_topology_desc(
      "", platform="cuda", target_config=_TARGET, topology=f"1x1x{num_devices}"
    )
    self.devices = topology.devices
    self._sharding = jax.sharding.SingleDeviceSharding(self.devices[0])

  def compile(self, function, *args, donate_argnums=(), is_decided=True):
    """Compiles a function of arrays, given by shape and dtype.

    Args:
      function: What to compile.
      *args: Pytrees of `jax.ShapeDtypeStruct`; one without a sharding lies on
        the first device.
      donate_argnums: As for `jax.jit`.
      is_decided: Whether it is known what runs before it is launched, as the
        host else waits for what a device decides.

    Returns:
      The compiled program, and for each kernel in it the bytes spilled.
    """
    self._capfd.readouterr()
    jax.clear_caches()  # A kernel that is not assembled again says nothing.
    args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding or self._sharding
      ),
      args,
    )
    traced = jax.jit(function, donate_argnums=donate_argnums).trace(*args)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    assert not misaligned_operands(compiled.as_text())
    assert is_decided == (not decided_by_devices(compiled.as_text()))
    self.said = "".join(self._capfd.readouterr())
    # A spill is told twice, once as a warning.
    lines = [x for x in self.said.splitlines() if "stack frame" in x]
    return compiled, [sum(map(int, _SPILLS.search(x).groups())) for x in lines]


def decided_by_devices(text):
  """Branches and loops for whose predicates the host waits, each time.

  Args:
    text: Of a compiled program.

  Returns:
    Lines of the text. A loop of a known number of turns is none of them.
  """
  return [
    line
    for line in text.splitlines()
    if _BRANCH_OR_LOOP.search(line) and '"known_trip_count"' not in line
  ]


def misaligned_operands(text):
  """Parts of arrays that kernels are given as they lie, off 256 bytes.

  Args:
    text: Of a compiled program.

  Returns:
    Lines of the text. On a GPU, a kernel refuses such an operand.
  """
  found = []
  for computation in text.split("\n}\n"):
    if 'custom_call_target="mosaic_gpu' not in computation:
      continue
    shapes = dict(_SHAPED.findall(computation))
    for line, operand, bounds in _SLICE.findall(computation):
      dtype, sizes = re.match(
        r"([a-z0-9]+)\[([\d,]*)\]", shapes[operand]
      ).groups()
      at = 0
      for size, (start, _) in zip(
        sizes.split(","), re.findall(r"\[(\d+):(\d+)", bounds), strict=True
      ):
        at = at * int(size) + int(start)
      bits = int(re.search(r"\d+", dtype)[0]) if dtype != "pred" else 8
      if at * bits // 8 % 256:
        found.append(line)
  return found


@pytest.fixture
def sm90a(capfd):
  return Sm90a(capfd)


@pytest.fixture
def sm90a_devices(capfd):
  """`Sm90a` for a number of devices."""
  return functools.partial(Sm90a, capfd)
