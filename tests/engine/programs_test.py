"""Programs work on the pool in place: temporaries stay below 1 % of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import pack
from infinite_llm.cache.table_store import TableStore, table_capacity
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import programs
from infinite_llm.engine.group_inputs import (
  empty_payloads,
  empty_slots,
  hosted_rows,
)
from infinite_llm.engine.kv_scales import place_kv_scales
from infinite_llm.engine.programs import GroupInputs, Params, StepKind
from infinite_llm.engine.step_batch import StepBatch, build_batch
from infinite_llm.lending_config import LendingConfig
from infinite_llm.models.hf_loader import load_hf
from pallas_kernels.pool_layout import held_dtype
from tests.testing import GOLDEN

NUM_BLOCKS = 100_000
BLOCK_SIZE = 16
SLOTS = 2
_NEWEST = jax.ShapeDtypeStruct((4,), jnp.int32)


def abstract_rows(tree, mesh):
  """What `place_rows` gives for a host tree of each instance, as a shape."""
  packed = pack(tree)
  words = jax.ShapeDtypeStruct(
    (mesh.shape["instance"], packed.words.shape[1]),
    jnp.int32,
    sharding=NamedSharding(mesh, PartitionSpec("instance")),
  )
  return dataclasses.replace(packed, words=words)


def abstract_pool(
  config, mesh, num_blocks=NUM_BLOCKS, kv_dtype="float32"
) -> PoolArrays:
  num_entries = table_capacity(num_blocks) * mesh.shape["instance"]
  num_blocks *= mesh.shape["instance"]
  shape = (
    num_blocks,
    config.num_layers,
    2,
    config.num_kv_heads,
    BLOCK_SIZE,
    config.head_dim,
  )
  return PoolArrays(
    *(
      jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec))
      for s, dtype, spec in (
        (shape, held_dtype(kv_dtype), POOL_SPECS.kv),
        ((num_blocks,), jnp.uint32, POOL_SPECS.tag),
        ((num_blocks,), jnp.uint32, POOL_SPECS.epoch),
        ((num_entries,), jnp.int32, POOL_SPECS.block_ids),
        ((num_entries,), jnp.int32, POOL_SPECS.logical_ids),
      )
    )
  )


def empty_batch(num_tokens: int, num_rows: int) -> StepBatch:
  return build_batch(
    [],
    [],
    TableStore(NUM_BLOCKS).take_writes(),
    num_tokens=num_tokens,
    num_rows=num_rows,
    block_size=BLOCK_SIZE,
  )


def check_in_place(compiled, pool: PoolArrays, mesh) -> None:
  """The pool is aliased, and temporaries are below 1 % of it."""
  pool_bytes = sum(x.size * x.dtype.itemsize for x in pool)
  pool_bytes //= mesh.devices.size
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes // 100


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("is_prefill", [False, True])
@pytest.mark.parametrize("is_group", [False, True])
def test_a_step_updates_the_pool_in_place(is_group, is_prefill, kv_dtype):
  num_instances = 2 if is_group else 1
  mesh = make_mesh(num_instances, 1)
  model = load_hf(GOLDEN / "llama3", mesh, dtype="float32")
  num_tokens = 128 if is_prefill else SLOTS
  batch = empty_batch(num_tokens, 1 if is_prefill else SLOTS)
  # As many bytes, so that the bound of 1 % is the same one.
  num_blocks = NUM_BLOCKS * 4 // jnp.dtype(kv_dtype).itemsize
  pool = abstract_pool(model.config, mesh, num_blocks, kv_dtype)
  config = engine_config(num_instances=num_instances, kv_dtype=kv_dtype)
  params = Params(model.state, place_kv_scales(model, config))
  assert (params.kv_scales is None) == (kv_dtype == "float32")
  args = [params, pool, abstract_rows(batch, mesh)]
  if is_group:
    hosted = hosted_rows((), (), num_instances, SLOTS)
    args.append(
      GroupInputs(
        hosted=abstract_rows(hosted, mesh),
        slots=abstract_rows(
          (empty_slots(num_instances, SLOTS), np.zeros(num_instances, bool)),
          mesh,
        ),
      )
    )
  elif not is_prefill:
    args.append(_NEWEST)
  step = programs.build_step(
    StepKind(is_group=is_group, is_prefill=is_prefill),
    model.graphdef,
    model.config,
    jax.tree.map(lambda leaf: leaf.sharding.spec, params),
    mesh,
    num_tokens=num_tokens,
  )
  check_in_place(step.lower(*args).compile(), pool, mesh)


def lowered_exchange(num_instances, shift, kv_dtype="float32", quota=16):
  """An exchange; also its pool and mesh."""
  mesh = make_mesh(num_instances, 1)
  config = load_hf(GOLDEN / "llama3", mesh, dtype="float32").config
  pool = abstract_pool(config, mesh, num_blocks=4096, kv_dtype=kv_dtype)
  sent = abstract_rows(empty_payloads(quota), mesh)
  exchange = programs.build_exchange(mesh, shift)
  return exchange.lower(pool, sent), pool, mesh


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_an_exchange_stages_two_quotas_however_many_instances(kv_dtype):
  exchange, pool, mesh = lowered_exchange(4, 1, kv_dtype)
  check_in_place(exchange.compile(), pool, mesh)


@pytest.mark.parametrize("quota", LendingConfig().exchange_buckets)
@pytest.mark.parametrize(("num_instances", "shift"), [(2, 1), (4, 1), (4, 3)])
def test_nothing_on_the_devices_decides_what_an_exchange_runs(
  num_instances, shift, quota
):
  """On a GPU the host would wait for it, and could launch nothing behind it."""
  exchange, _, _ = lowered_exchange(num_instances, shift, quota=quota)
  assert "stablehlo.collective_permute" in exchange.as_text()
  # What XLA's own passes for a CPU make of a scatter is no matter.
  assert not re.search(r"stablehlo\.(case|if|while)\b", exchange.as_text())
  assert not re.search(r"\bconditional\(", exchange.compile().as_text())


@pytest.mark.parametrize("shift", [0, 2])
def test_a_shift_that_leads_nowhere_is_refused(shift):
  with pytest.raises(ValueError, match=rf"in \[1, 2\); got {shift}"):
    programs.build_exchange(make_mesh(2, 1), shift)


def test_a_local_step_has_no_collective_over_instances():
  mesh = make_mesh(1, 1)
  model = load_hf(GOLDEN / "llama3", mesh, dtype="float32")
  batch = empty_batch(num_tokens=2, num_rows=2)
  step = programs.build_step(
    StepKind(is_group=False, is_prefill=False),
    model.graphdef,
    model.config,
    jax.tree.map(lambda leaf: leaf.sharding.spec, Params(model.state)),
    mesh,
    num_tokens=2,
  )
  lowered = step.lower(
    Params(model.state),
    abstract_pool(model.config, mesh),
    abstract_rows(batch, mesh),
    _NEWEST,
  ).as_text()
  for collective in ("all_gather", "all_to_all", "collective_permute"):
    assert collective not in lowered
