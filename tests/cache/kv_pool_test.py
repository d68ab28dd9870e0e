import re

import jax
import pytest

from infinite_llm.cache.kv_pool import KVPool
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.errors import ConfigError


@pytest.mark.parametrize(
  ("num_blocks", "block_size"), [(2**33, 16), (4, 2**40), (2**62, 16)]
)
def test_a_pool_that_fits_on_no_device_is_refused(
  monkeypatch, num_blocks, block_size
):
  # Nothing may even be tried: some systems grant any amount of memory.
  monkeypatch.setattr(jax, "jit", pytest.fail)
  mesh = make_mesh(2, 2)
  # Two layers, keys and values, two heads of 16 in float32, on two devices.
  device_bytes = num_blocks * 2 * 2 * 2 * block_size * 16 * 4 // 2
  message = (
    "num_blocks x block_size must fit on the devices; got"
    f" {num_blocks} x {block_size}, which takes {device_bytes} bytes of each,"
  )
  with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
    KVPool(
      mesh,
      [row_mesh(mesh, 0), row_mesh(mesh, 1)],
      num_blocks=num_blocks,
      num_layers=2,
      num_kv_heads=2,
      block_size=block_size,
      head_dim=16,
      dtype="float32",
    )
