"""fetch_words assembles for Hopper, alone and for an instance's devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.cache import host_words
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from pallas_kernels.fetch_words import mosaic_gpu


@pytest.mark.parametrize("width", [128, 2432, 65536])
def test_it_needs_no_memory_of_its_own(sm90a, width):
  words = jax.ShapeDtypeStruct((1, width), jnp.int32)
  compiled, spills = sm90a.compile(mosaic_gpu.fetch, words)
  assert spills == [0]
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes == 0
  assert memory.output_size_in_bytes == 4 * width


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_device_of_an_instance_reads_by_itself(
  sm90a_devices, monkeypatch, ranks
):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  sm90a = sm90a_devices(2 * ranks)
  row = row_mesh(make_mesh(2, ranks, sm90a.devices), 1)
  sharding = NamedSharding(row, PartitionSpec("instance"))
  words = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=sharding)
  compiled, _ = sm90a.compile(host_words._fetch(row), words)
  assert "mosaic_gpu" in compiled.as_text()
  assert "all-" not in compiled.as_text()
