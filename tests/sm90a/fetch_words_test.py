"""fetch_words assembles for Hopper, and loads words one by one."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.fetch_words import mosaic_gpu


@pytest.mark.parametrize("width", [128, 2432, 65536])
def test_it_needs_no_memory_of_its_own(sm90a, width):
  words = jax.ShapeDtypeStruct((1, width), jnp.int32)
  compiled, spills = sm90a.compile(mosaic_gpu.fetch, words)
  assert spills == [0]
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes == 0
  assert memory.output_size_in_bytes == 4 * width
