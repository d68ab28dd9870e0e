"""The programs of steps that attend host memory assemble, and copy no pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import pack
from infinite_llm.cache.table_store import TableStore
from infinite_llm.cache.tier_moves import TierBatch, build_leave_as_slab
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.group_inputs import empty_slots, hosted_rows
from infinite_llm.engine.layered_programs import LayeredPrograms
from infinite_llm.engine.programs import GroupInputs, Params
from infinite_llm.engine.step_batch import build_batch
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables
from tests.sm90a.steps_test import on_mesh

N, L, K, P, D, H, S = 4096, 32, 8, 64, 128, 32, 64
CONFIG = ModelConfig(
  vocab_size=1024,
  model_dim=4096,
  mlp_dim=14336,
  num_layers=1,
  num_q_heads=H,
  num_kv_heads=K,
  head_dim=D,
)
BLOCK_BYTES = 2 * L * 2 * K * P * D
SCALE_SPECS = PartitionSpec(None, None, "tensor")
DTYPES = (jnp.bfloat16, jnp.uint8)


def _array(shape, dtype):
  return jax.ShapeDtypeStruct(shape, dtype)


def _ints(n, dtype=jnp.int32):
  return _array((n,), dtype)


POOL = PoolArrays(
  kv=_array((N, L, 2, K, P, D), jnp.bfloat16),
  tag=_ints(N, jnp.uint32),
  epoch=_ints(N, jnp.uint32),
  block_ids=_ints(5 * N // 2),
  logical_ids=_ints(5 * N // 2),
)


@pytest.fixture(name="row")
def _row(sm90a, monkeypatch):
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  return make_mesh(1, 1, sm90a.devices)


class Step:
  """Programs for one number of tokens, and what they take.

  Attributes:
    programs: Their builders.
    layer: Parameters of a layer.
    batch: One row.
  """

  def __init__(self, row, num_tokens):
    graphdef, state = abstract_transformer(
      CONFIG, dtype=jnp.bfloat16, tensor_axis="tensor"
    )
    model = LoadedModel(config=CONFIG, graphdef=graphdef, state=state, mesh=row)
    whole = nnx.merge(graphdef, state)
    self.programs = LayeredPrograms(
      model=model,
      layer_def=nnx.split(whole.layers[0])[0],
      param_specs=Params(param_specs(CONFIG, row), SCALE_SPECS),
      mesh=row,
      num_tokens=num_tokens,
      attention=None,
    )
    self.layer = state["layers"][0]
    batch = build_batch(
      [],
      [],
      TableStore(N).take_writes(),
      num_tokens=num_tokens,
      num_rows=1,
      block_size=P,
    )
    self.batch = _packed(batch)
    self.x = _array((num_tokens, CONFIG.model_dim), jnp.bfloat16)
    self.q = _array((num_tokens, H, D), jnp.bfloat16)
    self.state = AttentionState(
      _array((num_tokens, H, D), jnp.float32),
      _array((num_tokens, H), jnp.float32),
    )


def _scales(dtype):
  """Those of a pool of float8, which is one of bytes."""
  return _array((L, 2, K), jnp.float32) if dtype == jnp.uint8 else None


def _packed(tree):
  """What `place_rows` gives for a host tree of the instance, as a shape."""
  return jax.tree.map(lambda x: _array(x.shape, x.dtype), pack(tree))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 1024])
def test_a_layer_appends_in_place_and_reads_the_pool_where_it_is(
  sm90a, row, num_tokens, dtype
):
  step = Step(row, num_tokens)
  entries, rows = np.zeros(N, np.int32), np.zeros(1, np.int32)
  tables = _packed(BlockTables(entries, entries, rows, rows))
  compiled, spills = sm90a.compile(
    step.programs.front(),
    step.layer,
    step.x,
    POOL._replace(kv=_array(POOL.kv.shape, dtype)),
    _array((), jnp.int32),
    _scales(dtype),
    step.batch,
    tables,
    donate_argnums=2,
    # Bytes are widened part by part for prefill, as many as there are.
    is_decided=not (dtype == jnp.uint8 and num_tokens > 1),
  )
  assert spills
  memory = compiled.memory_analysis()
  pool_bytes = N * BLOCK_BYTES * jnp.dtype(dtype).itemsize // 2
  assert memory.alias_size_in_bytes > pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


@pytest.mark.parametrize("num_tokens", [1, 1024])
def test_others_attend_a_layer_in_place_too(
  sm90a_devices, monkeypatch, num_tokens
):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  sm90a = sm90a_devices(2)
  mesh = make_mesh(2, 1, sm90a.devices)
  step = Step(mesh, num_tokens)
  entries, rows = np.zeros(N, np.int32), np.zeros(1, np.int32)
  slots = (empty_slots(2, 4), np.zeros(2, bool))
  group = GroupInputs(
    hosted=_packed(hosted_rows((), (), 2, 4)), slots=_packed(slots)
  )
  tables = _packed(BlockTables(entries, entries, rows, rows))
  programs, each = step.programs, PartitionSpec("instance")
  compiled, spills = sm90a.compile(
    programs.group_front(),
    on_mesh(mesh, step.layer, programs._layer_specs),
    on_mesh(mesh, step.x, each, 2),
    on_mesh(mesh, POOL, POOL_SPECS, 2),
    on_mesh(mesh, _array((), jnp.int32), PartitionSpec()),
    None,
    *(on_mesh(mesh, x, each, 2) for x in (step.batch, tables, group)),
    donate_argnums=2,
  )
  assert spills
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes > N * BLOCK_BYTES // 2
  assert memory.temp_size_in_bytes < N * BLOCK_BYTES / 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 1024])
def test_slabs_are_attended_without_a_copy_of_them(
  sm90a, row, num_tokens, dtype
):
  step = Step(row, num_tokens)
  tables = BlockTables(_ints(1 + S), _ints(1 + S), _ints(1), _ints(1))
  part = _array((1 + S, 1, 2, K, P, D), dtype)
  compiled, spills = sm90a.compile(
    step.programs.add(),
    step.state,
    _ints(1, jnp.uint32),
    step.q,
    _array((), jnp.int32),
    _scales(dtype),
    step.batch,
    ((part, _ints(1 + S, jnp.uint32), tables),) * step.programs.slabs_together,
  )
  assert spills
  slab_bytes = (1 + S) * BLOCK_BYTES // L
  # Bytes are widened for prefill, here a slab at once (docs/float8.md), and
  # what was attended of them is merged.
  is_widened = dtype == jnp.uint8 and num_tokens > 1
  most = 3 * slab_bytes if is_widened else slab_bytes / 20
  assert compiled.memory_analysis().temp_size_in_bytes < most


def test_a_slab_leaves_by_way_of_one_copy(sm90a, row):
  batch = TierBatch(*(np.zeros(S, t) for t in ("i4", "u4", "i4", "u4")))
  compiled, spills = sm90a.compile(
    build_leave_as_slab(row), POOL.kv, POOL.tag, _packed(batch)
  )
  assert spills
  memory = compiled.memory_analysis()
  # `engine/pool_size.py` counts on that: once packed, once layer by layer.
  assert memory.temp_size_in_bytes <= (1 + S) * BLOCK_BYTES + 2**20
  assert memory.output_size_in_bytes <= (1 + S) * BLOCK_BYTES + 2**20
