"""Step programs of engines compile for Hopper.

None copies the pool, those of a group compute while they exchange, and an
exchange of rBlocks lets the host go on.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import pack
from infinite_llm.cache.table_store import EntryWrites, table_capacity
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.group_inputs import (
  empty_payloads,
  empty_slots,
  hosted_rows,
)
from infinite_llm.engine.programs import (
  GroupInputs,
  Params,
  StepKind,
  build_exchange,
  build_step,
)
from infinite_llm.engine.step_batch import build_batch
from infinite_llm.lending_config import LendingConfig
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.types import TENSOR_AXIS
from pallas_kernels.append_kv.api import append_kv

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
    *([] if is_prefill else [_array((num_rows,))]),
    donate_argnums=1,
  )
  memory = compiled.memory_analysis()
  pool_bytes = 2 * math.prod(KV)
  assert memory.alias_size_in_bytes > pool_bytes
  assert memory.temp_size_in_bytes < 0.1 * pool_bytes


def test_parts_of_arrays_off_256_bytes_are_noticed(sm90a, monkeypatch):
  def attend(words, kv, k):
    ids = words[193:257]
    return append_kv(kv, 0, k, k, ids, ids, implementation="mosaic_gpu")

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  words, k = _array((400,)), _array((64, 8, 128), jnp.bfloat16)
  with pytest.raises(AssertionError, match=r"slice={\[193:257\]}"):
    sm90a.compile(attend, words, _array(KV, jnp.bfloat16), k, donate_argnums=1)


SLOTS, ROWS = 4, 64
PER_INSTANCE = PartitionSpec("instance")


def on_mesh(mesh, tree, specs, copies=1):
  """A tree of what lies on one instance, as it lies on all of them."""

  def place(x, spec):
    count = copies if spec[:1] == ("instance",) else 1
    shape = (count * x.shape[0], *x.shape[1:]) if x.shape else ()
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

  if isinstance(specs, PartitionSpec):
    return jax.tree.map(lambda x: place(x, specs), tree)
  return jax.tree.map(place, tree, specs)


def _scheduled(compiled) -> str:
  """What a program runs, in order, a word for each thing that matters."""
  words = {
    r"all-gather-start\(": "gather",
    r"all-gather-done\(": "gathered",
    # Of states; that of coverage may lie anywhere.
    r"= \(*f32.* all-to-all-start\(": "answer",
    r"= \(*f32.* all-to-all-done\(": "answered",
    rf"= \(f32\[{ROWS},32,128\]": "local",
    r"= \(f32\[\d+,32,128\]": "hosted",
    r" fusion\(.*/append_kv/": "append",
  }
  _, entry = compiled.as_text().split("\nENTRY ")
  found = []
  for line in entry.splitlines():
    if "parameter(" in line or "get-tuple-element(" in line:
      continue
    found += [word for rule, word in words.items() if re.search(rule, line)][:1]
  return " ".join(found)


@pytest.mark.parametrize("num_instances", [2, 4])
def test_group_steps_compute_while_they_exchange(
  sm90a_devices, monkeypatch, num_instances
):
  sm90a = sm90a_devices(num_instances)
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  mesh = make_mesh(num_instances, 1, sm90a.devices)
  graphdef, state = abstract_transformer(
    MODEL, dtype=jnp.bfloat16, tensor_axis=TENSOR_AXIS
  )
  params, specs = Params(state), Params(param_specs(MODEL, mesh))
  slots = (empty_slots(num_instances, SLOTS), np.zeros(num_instances, bool))
  group = GroupInputs(
    hosted=pack(hosted_rows((), (), num_instances, SLOTS)), slots=pack(slots)
  )
  step = build_step(
    StepKind(is_group=True, is_prefill=False),
    graphdef,
    MODEL,
    specs,
    mesh,
    num_tokens=ROWS,
  )
  compiled, _ = sm90a.compile(
    step,
    on_mesh(mesh, params, specs),
    on_mesh(mesh, _pool(jnp.bfloat16), POOL_SPECS, num_instances),
    *(
      on_mesh(mesh, tree, PER_INSTANCE, num_instances)
      for tree in (_batch(ROWS, ROWS), group)
    ),
    donate_argnums=1,
  )
  # The first layer's queries go with what names the slots, which the plans for
  # the kernels need; before the other layers nothing does.
  first = "gather gathered append hosted answer local answered"
  layer = "gather append gathered hosted answer local answered"
  want = " ".join([first] + [layer] * (MODEL.num_layers - 1))
  assert _scheduled(compiled).startswith(want)


@pytest.mark.parametrize("num_instances", [2, 4])
@pytest.mark.parametrize("quota", LendingConfig().exchange_buckets)
@pytest.mark.parametrize("verify", [False, True])
def test_no_device_decides_what_an_exchange_runs(
  sm90a_devices, monkeypatch, num_instances, quota, verify
):
  sm90a = sm90a_devices(num_instances)
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  mesh = make_mesh(num_instances, 1, sm90a.devices)
  compiled, _ = sm90a.compile(
    build_exchange(mesh, num_instances - 1, verify=verify),
    on_mesh(mesh, _pool(jnp.bfloat16), POOL_SPECS, num_instances),
    on_mesh(mesh, pack(empty_payloads(quota)), PER_INSTANCE, num_instances),
    donate_argnums=0,
  )
  # That nothing waits for a device is looked at by `Sm90a.compile`.
  assert "collective-permute" in compiled.as_text()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes > 2 * math.prod(KV)
  assert memory.temp_size_in_bytes < 0.01 * 2 * math.prod(KV)
