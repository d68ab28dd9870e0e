"""Launches steps that attend HOST: layer by layer, while slabs stream in."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import SpillSlots
from infinite_llm.cache.packed_rows import place_rows
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
from infinite_llm.engine.layered_run import Attended, LayeredRun, Part
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import GroupInputs, StepOutput
from infinite_llm.engine.repeating import at_most_every
from infinite_llm.engine.step_batch import RowInput, build_batch
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import INSTANCE_AXIS, InstanceId, RequestUid
from pallas_kernels.micro_attention.api import BlockTables

_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)


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
    meanwhile: Callable[[], None],
  ):
    """Compiles nothing.

    Args:
      model: Parameters, sharded over the mesh of the lending group.
      config: Sizes of everything.
      runner: The pools.
      tiers: What lies in host memory.
      attention: Name of the micro-attention; None picks.
      meanwhile: Called once a heartbeat period while slabs come.

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
    self._meanwhile = at_most_every(
      config.lending.heartbeat_every_s, time.monotonic, meanwhile
    )
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

    self._buckets = config.layered_buckets
    self._programs = {
      (instance, num_tokens): programs(row, num_tokens)
      for instance, row in zip(runner.instances, runner.row_meshes, strict=True)
      for num_tokens in self._buckets
    }
    self._mesh = model.mesh
    self._group_programs = {n: programs(self._mesh, n) for n in self._buckets}
    # On the devices already: a step is many short programs.
    self._layers = [
      jax.device_put(
        list(np.arange(self._num_layers, dtype=np.int32)),
        NamedSharding(row, PartitionSpec()),
      )
      for row in runner.row_meshes
    ]
    self._group_layers = [
      join_rows(numbers, self._mesh, PartitionSpec())
      for numbers in zip(*self._layers, strict=True)
    ]
    self._idle: dict[tuple[int, int], Part] = {}

  def step(
    self, instance: InstanceId, uid: RequestUid, row: RowInput
  ) -> StepOutput:
    """Computes a row that is all at home; blocks the host while slabs come.

    Args:
      instance: Whose request it is.
      uid: The request.
      row: One token, or a chunk of a prompt.

    Returns:
      Output of one row, still being computed.
    """
    num_tokens = len(row.token_ids)
    slabs = self._tiers.held(instance, uid)
    output = self._launch(instance, [row], slabs, self._buckets[num_tokens > 1])
    name = "layered_decode" if num_tokens == 1 else "layered_prefill"
    self._runner.launches[name] += 1
    return output

  def group_step(
    self,
    rows: Sequence[Mapping[RequestUid, RowInput]],
    slots: Sequence[SpillSlots],
    bucket: int | None = None,
  ) -> tuple[list[StepOutput | None], list[jax.Array]]:
    """Computes rows with rBlocks elsewhere too; blocks the host likewise.

    Args:
      rows: Of each instance at most one, in row 0 of its spill slot.
      slots: Spill slots of each instance.
      bucket: Query tokens of the programs; None picks.

    Returns:
      Output of each instance's row, None without one; and an array of each
      instance that is there once it has answered for others. All still being
      computed.
    """
    if bucket is None:
      most = max(len(row.token_ids) for mine in rows for row in mine.values())
      bucket = self._buckets[most > 1]
    runs: dict[int, LayeredRun] = {}
    for own, (instance, mine) in enumerate(
      zip(self._runner.instances, rows, strict=True)
    ):
      for uid, row in mine.items():
        slabs = self._tiers.held(instance, uid)
        runs[own] = self._begin(own, [row], slabs, bucket)
    answers = self._launch_together(runs, slots, bucket)
    name = "layered_group_decode" if bucket == 1 else "layered_group_prefill"
    self._runner.launches[name] += 1
    outputs = [
      runs[own].end() if own in runs else None for own in range(len(rows))
    ]
    return outputs, answers

  def warm_up(self) -> Iterator[tuple[InstanceId, StepOutput]]:
    """Runs every program once with nothing to do.

    Yields:
      An instance, and what a step of it gave.
    """
    for own, instance in enumerate(self._runner.instances):
      nothing = self._tiers.slabs[own].warm_up(self._runner.pool.row(own))
      for bucket in self._buckets:
        yield instance, self._launch(instance, [], [nothing], bucket)
    if self._config.has_group:
      num_instances = self._config.num_instances
      nobody = empty_slots(num_instances, self._config.lending.spill_slots)
      slots = [nobody] * len(self._runner.instances)
      for bucket in self._buckets:
        self._launch_together({}, slots, bucket)

  def _launch(
    self,
    instance: InstanceId,
    rows: Sequence[RowInput],
    slabs: Sequence[HeldSlab],
    bucket: int,
  ) -> StepOutput:
    run = self._begin(
      self._runner.instances.index(instance), rows, slabs, bucket
    )
    for index in range(self._num_layers):
      run.end_layer(index, run.front(index))
    return run.end()

  def _begin(
    self,
    own: int,
    rows: Sequence[RowInput],
    slabs: Sequence[HeldSlab],
    bucket: int,
  ) -> LayeredRun:
    return LayeredRun(
      self._runner,
      own,
      self._programs[self._runner.instances[own], bucket],
      self._layers[own],
      *self._place(own, rows, bucket),
      slabs,
      self._tiers.slabs[own],
      self._meanwhile,
    )

  def _launch_together(
    self,
    runs: Mapping[int, LayeredRun],
    slots: Sequence[SpillSlots],
    bucket: int,
  ) -> list[jax.Array]:
    """Launches all layers of some instances' rows, which all others answer.

    Args:
      runs: The rows, by which of this process's instances they are of.
      slots: Spill slots of each of this process's instances.
      bucket: Query tokens of the programs.

    Returns:
      An array of each instance that is there once its last layer is attended.
    """
    group = self._runner.answering(slots)
    attended: list[Attended] = []
    for index in range(self._num_layers):
      parts = [
        runs[own].part if own in runs else self._idle_part(own, bucket)
        for own in range(len(self._runner.instances))
      ]
      attended = self._front_of_all(index, bucket, parts, group)
      for own, run in runs.items():
        run.end_layer(index, attended[own])
    return [mine.covered for mine in attended]

  def _front_of_all(
    self, index: int, bucket: int, parts: Sequence[Part], group: GroupInputs
  ) -> list[Attended]:
    """Has all instances attend what they hold of a layer, for each other."""
    whole = jax.tree.map(
      lambda *leaves: join_rows(leaves, self._mesh, _PER_INSTANCE), *parts
    )
    weights, kv_scales = self._runner.params
    pool, *attended = self._runner.programs.run(
      ("layered group front", bucket),
      self._group_programs[bucket].group_front,
      (
        weights["layers"][index],
        whole.x,
        self._runner.pool.group(),
        *(self._group_layers[index], kv_scales, whole.batch, whole.tables),
        group,
      ),
    )
    self._runner.pool.set_group(pool)
    return [
      Attended(
        *jax.tree.map(
          lambda leaf, spec, row=row: split_rows(leaf, [row], spec)[0],
          tuple(attended),
          ATTENDED_SPECS,
        )
      )
      for row in self._runner.row_meshes
    ]

  def _idle_part(self, own: int, bucket: int) -> Part:
    """What an instance without a row brings: placed once."""
    if (own, bucket) not in self._idle:
      run = self._begin(own, [], [], bucket)
      self._idle[own, bucket] = run.part
    return self._idle[own, bucket]

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
