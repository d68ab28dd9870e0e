"""Step programs of engines compile for Hopper, and none copies the pool."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.cache.kv_pool import PoolArrays
from infinite_llm.cache.packed_rows import pack
from infinite_llm.cache.table_store import EntryWrites, table_capacity
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.programs import Params, StepKind, build_step
from infinite_llm.engine.step_batch import build_batch
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.types import TENSOR_AXIS

# An 8B Llama-3 of few layers, and a pool in which a copy would show.
MODEL = ModelConfig(
  vocab_size=128256,
  model_dim=4096,
  mlp_dim=14336,
  num_layers=3,
  num_q_heads=32,
  num_kv_heads=8,
  head_dim=128,
)
NUM_BLOCKS, BLOCK_SIZE = 30_000, 64
KV = (NUM_BLOCKS, MODEL.num_layers, 2, 8, BLOCK_SIZE, MODEL.head_dim)


def _array(shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _pool(dtype):
  entries = _array((table_capacity(NUM_BLOCKS),))
  tags = _array((NUM_BLOCKS,), jnp.uint32)
  return PoolArrays(_array(KV, dtype), tags, tags, entries, entries)


def _batch(num_tokens, num_rows):
  batch = build_batch(
    [],
    [],
    EntryWrites(*np.zeros((3, 0), np.int32)),
    num_tokens=num_tokens,
    num_rows=num_rows,
    block_size=BLOCK_SIZE,
  )
  return jax.tree.map(lambda x: _array(x.shape, x.dtype), pack(batch))


@pytest.mark.parametrize(
  ("is_prefill", "num_tokens", "num_rows"), [(False, 64, 64), (True, 2048, 8)]
)
def test_local_steps_write_the_pool_in_place(
  sm90a, monkeypatch, is_prefill, num_tokens, num_rows
):
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  row = make_mesh(1, 1, sm90a.devices)
  graphdef, state = abstract_transformer(
    MODEL, dtype=jnp.bfloat16, tensor_axis=TENSOR_AXIS
  )
  step = build_step(
    StepKind(is_group=False, is_prefill=is_prefill),
    graphdef,
    MODEL,
    Params(param_specs(MODEL, row)),
    row,
    num_tokens=num_tokens,
  )
  compiled, _ = sm90a.compile(
    step,
    Params(state),
    _pool(jnp.bfloat16),
    _batch(num_tokens, num_rows),
    donate_argnums=1,
  )
  memory = compiled.memory_analysis()
  pool_bytes = 2 * math.prod(KV)
  assert memory.alias_size_in_bytes > pool_bytes
  assert memory.temp_size_in_bytes < 0.1 * pool_bytes
