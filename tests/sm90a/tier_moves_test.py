"""The programs at the HBM end of tier moves assemble, and copy no pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.cache.kv_pool import PoolArrays
from infinite_llm.cache.packed_rows import pack
from infinite_llm.cache.tier_moves import TierBatch, build_enter, build_leave
from infinite_llm.distributed.mesh import make_mesh

Q = 16
POOL = (4096, 32, 2, 8, 64, 128)
BLOCK_BYTES = 2 * int(np.prod(POOL[1:]))


def _ints(n, dtype=jnp.int32):
  return jax.ShapeDtypeStruct((n,), dtype)


def _block(n):
  return jax.ShapeDtypeStruct((n, *POOL[1:]), jnp.bfloat16)


BATCH = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
  pack(TierBatch(*(np.zeros(Q, t) for t in ("i4", "u4", "i4", "u4")))),
)
HOST_TAG = _ints(20_000, jnp.uint32)


@pytest.fixture(name="row")
def _row(sm90a, monkeypatch):
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  return make_mesh(1, 1, sm90a.devices)


@pytest.mark.parametrize("verify", [False, True])
def test_leaving_stages_only_what_leaves(sm90a, row, verify):
  tag = _ints(POOL[0], jnp.uint32)
  leave = build_leave(row, Q, verify=verify)
  compiled, spills = sm90a.compile(leave, _block(POOL[0]), tag, HOST_TAG, BATCH)
  assert spills
  assert not any(spills)
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < BLOCK_BYTES
  assert memory.output_size_in_bytes < (Q + 1) * BLOCK_BYTES


@pytest.mark.parametrize("verify", [False, True])
def test_entering_writes_the_pool_in_place(sm90a, row, verify):
  pool = PoolArrays(
    kv=_block(POOL[0]),
    tag=_ints(POOL[0], jnp.uint32),
    epoch=_ints(POOL[0], jnp.uint32),
    block_ids=_ints(16_384),
    logical_ids=_ints(16_384),
  )
  enter = build_enter(row, Q, verify=verify)
  compiled, spills = sm90a.compile(
    enter, pool, HOST_TAG, BATCH, (_block(1),) * Q, donate_argnums=0
  )
  assert spills
  assert not any(spills)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes > POOL[0] * BLOCK_BYTES
  assert memory.temp_size_in_bytes < BLOCK_BYTES
