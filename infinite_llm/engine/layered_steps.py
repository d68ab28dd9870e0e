"""Launches steps that attend HOST: layer by layer, while slabs stream in."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import SpillSlots
from infinite_llm.cache.packed_rows import PackedRows, place_rows
from infinite_llm.cache.rows import join_rows, split_rows
from infinite_llm.cache.slab_store import HeldSlab
from infinite_llm.cache.table_store import EntryWrites
from infinite_llm.config import EngineConfig
from infinite_llm.engine.group_inputs import empty_slots
from infinite_llm.engine.host_tier import HostTiers
from infinite_llm.engine.layered_programs import (
  ATTENDED_SPECS,
  LayeredPrograms,
)
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import GroupInputs, StepOutput
from infinite_llm.engine.step_batch import RowInput, StepBatch, build_batch
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import INSTANCE_AXIS, InstanceId, RequestUid
from pallas_kernels.micro_attention.api import BlockTables

_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)


class _Part(NamedTuple):
  """What one instance brings to a layer.

  Attributes:
    x: `[T, dim]` tokens; of an instance without rows, anything.
    batch: Its row.
    tables: What that reads in HBM.
  """

  x: jax.Array
  batch: PackedRows[StepBatch]
  tables: PackedRows[BlockTables]


class LayeredSteps:
  """Computes rows of requests that have rBlocks in host memory, one at a time.

  Its tables come with every step: the arrays beside the pool name no such row.
  What other instances hold of the request they attend as in group steps, a
  layer at a time.
  """

  def __init__(
    self,
    model: LoadedModel,
    config: EngineConfig,
    runner: ModelRunner,
    tiers: HostTiers,
    attention: str | None,
  ):
    """Compiles nothing.

    Args:
      model: Parameters, sharded over the mesh of the lending group.
      config: Sizes of everything.
      runner: The pools.
      tiers: What lies in host memory.
      attention: Name of the micro-attention; None picks.

    Raises:
      ConfigError: If the model has sliding windows.
    """
    if model.config.sliding_window is not None:
      raise ConfigError(
        "host_attention must be False for a model with sliding windows; got"
        f" True, and sliding_window is {model.config.sliding_window}."
      )
    self._config = config
    self._runner = runner
    self._tiers = tiers
    self._num_layers = model.config.num_layers
    params = runner.row_params[0]
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    whole = nnx.merge(model.graphdef, model.state)
    layer_def, _ = nnx.split(whole.layers[0])

    def programs(mesh: Mesh, num_tokens: int) -> LayeredPrograms:
      return LayeredPrograms(
        model=model,
        layer_def=layer_def,
        param_specs=specs,
        mesh=mesh,
        num_tokens=num_tokens,
        attention=attention,
      )

    self._programs = {
      (instance, num_tokens): programs(row, num_tokens)
      for instance, row in zip(runner.instances, runner.row_meshes, strict=True)
      for num_tokens in self._buckets
    }
    self._mesh = model.mesh
    self._group_programs = {n: programs(self._mesh, n) for n in self._buckets}
    # On the devices already: a step is many short programs.
    self._layers = [self._numbers(row) for row in runner.row_meshes]
    self._group_layers = self._numbers(self._mesh)
    self._idle: dict[tuple[int, int], _Part] = {}

  def step(
    self,
    instance: InstanceId,
    uid: RequestUid,
    row: RowInput,
    slots: Sequence[SpillSlots] | None = None,
  ) -> StepOutput:
    """Computes a row; blocks the host until its last slab may come.

    Args:
      instance: Whose request it is.
      uid: The request.
      row: One token, or a chunk of a prompt.
      slots: Spill slots of each instance, of which row 0 of `instance` has one;
        None if the request has nothing at other instances.

    Returns:
      Output of one row, still being computed.
    """
    slabs = self._tiers.held(instance, uid)
    kind = "decode" if len(row.token_ids) == 1 else "prefill"
    name = f"layered_{kind}" if slots is None else f"layered_group_{kind}"
    output = self._launch(instance, [row], slabs, len(row.token_ids), slots)
    self._runner.launches[name] += 1
    return output

  def warm_up(self) -> Iterator[tuple[InstanceId, StepOutput]]:
    """Runs every program once with nothing to do.

    Yields:
      An instance, and what a step of it gave.
    """
    for own, instance in enumerate(self._runner.instances):
      pool = self._runner.pool.row(own)
      nothing = self._tiers.slabs[own].warm_up(pool)
      for num_tokens in self._buckets:
        yield instance, self._launch(instance, [], [nothing], num_tokens)
        if self._config.has_group and not own:
          slots = self._no_slots()
          self._launch(instance, [], [nothing], num_tokens, slots)

  @property
  def _buckets(self) -> tuple[int, int]:
    """Numbers of tokens that there are programs for, unless they are equal."""
    return 1, self._config.scheduler.chunk_tokens

  def _launch(
    self,
    instance: InstanceId,
    rows: Sequence[RowInput],
    slabs: Sequence[HeldSlab],
    num_tokens: int,
    slots: Sequence[SpillSlots] | None = None,
  ) -> StepOutput:
    bucket = self._buckets[num_tokens > 1]
    programs = self._programs[instance, bucket]
    own = self._runner.instances.index(instance)
    weights, kv_scales = self._runner.row_params[own]
    group = None if slots is None else self._runner.answering(slots)
    batch, tables = self._place(own, rows, bucket)

    def run(name: str, *args: Any) -> Any:
      return self._runner.programs.run(
        (f"layered {name}", instance, bucket),
        lambda: getattr(programs, name)(),
        args,
      )

    pool, x, proved = run("begin", weights, self._runner.pool.row(own), batch)
    self._runner.pool.set_row(own, pool)
    stream = self._tiers.slabs[own].stream(slabs)
    for index, layer in enumerate(self._layers[own]):
      mine, read = weights["layers"][index], (layer, kv_scales, batch)
      if group is None:
        pool, *attended = run(
          "front", mine, x, self._runner.pool.row(own), *read, tables
        )
        self._runner.pool.set_row(own, pool)
      else:
        part = _Part(x, batch, tables)
        attended = self._front_of_all(own, bucket, index, part, group)
      q, state, covered = attended
      for slab in slabs:
        staged = (stream.take(), slab.tag, slab.tables)
        state, covered = run("add", state, covered, q, *read, *staged)
        del staged  # Its room is that of the next one.
        stream.used(covered)
      x, proved = run("back", mine, x, batch, state, covered, proved)
    return run("end", weights, x, batch, proved)

  def _front_of_all(
    self, own: int, bucket: int, index: int, part: _Part, group: GroupInputs
  ) -> list[Any]:
    """Has all instances attend what they hold of a layer, for one of them."""
    parts = [
      part if other == own else self._idle_part(other, bucket, part.x)
      for other in range(len(self._runner.instances))
    ]
    whole = jax.tree.map(
      lambda *leaves: join_rows(leaves, self._mesh, _PER_INSTANCE), *parts
    )
    weights, kv_scales = self._runner.params
    layer = self._group_layers[index]
    pool, *attended = self._runner.programs.run(
      ("layered group front", bucket),
      self._group_programs[bucket].group_front,
      (
        weights["layers"][index],
        whole.x,
        self._runner.pool.group(),
        *(layer, kv_scales, whole.batch, whole.tables, group),
      ),
    )
    self._runner.pool.set_group(pool)
    row = [self._runner.row_meshes[own]]
    return [
      jax.tree.map(lambda leaf, at: split_rows(leaf, row, at)[0], tree, specs)
      for tree, specs in zip(attended, ATTENDED_SPECS, strict=True)
    ]

  def _idle_part(self, own: int, bucket: int, x: jax.Array) -> _Part:
    """What an instance without rows brings: placed once."""
    if (own, bucket) not in self._idle:
      row = self._runner.row_meshes[own]
      zeros = np.zeros(x.shape, x.dtype)
      placed = jax.device_put(zeros, NamedSharding(row, _PER_INSTANCE))
      part = _Part(placed, *self._place(own, [], bucket))
      self._idle[own, bucket] = part
    return self._idle[own, bucket]

  def _no_slots(self) -> list[SpillSlots]:
    """Spill slots that nobody uses."""
    num_instances = self._config.num_instances
    num_slots = self._config.lending.spill_slots
    return [empty_slots(num_instances, num_slots)] * num_instances

  def _numbers(self, mesh: Mesh) -> list[jax.Array]:
    """The number of each layer, on a mesh."""
    numbers = list(np.arange(self._num_layers, dtype=np.int32))
    return jax.device_put(numbers, NamedSharding(mesh, PartitionSpec()))

  def _place(
    self, own: int, rows: Sequence[RowInput], num_tokens: int
  ) -> tuple[Any, Any]:
    """Puts a batch, and tables of what it reads in HBM, on the devices."""
    num_blocks = self._runner.pool.row(own).tag.shape[0]
    batch = build_batch(
      rows,
      [0] * len(rows),
      EntryWrites(*np.zeros((3, 0), np.int32)),
      num_tokens=num_tokens,
      num_rows=1,
      block_size=self._config.cache.block_size,
    )
    entries = np.zeros((2, num_blocks), np.int32)
    for row in rows:
      span = row.entries()
      entries[:, : len(span)] = span.block_ids, span.logical_ids
    block_ids, logical_ids = entries
    tables = BlockTables(block_ids, logical_ids, batch.starts, batch.counts)
    mesh = self._runner.row_meshes[own]
    return tuple(place_rows([tree], mesh, [mesh]) for tree in (batch, tables))
