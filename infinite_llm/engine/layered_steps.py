"""Launches steps that attend HOST: layer by layer, while slabs stream in."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.slab_store import HeldSlab
from infinite_llm.cache.table_store import EntryWrites
from infinite_llm.config import EngineConfig
from infinite_llm.engine.host_tier import HostTiers
from infinite_llm.engine.layered_programs import LayeredPrograms
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.step_batch import RowInput, build_batch
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import InstanceId, RequestUid
from pallas_kernels.micro_attention.api import BlockTables


class LayeredSteps:
  """Computes rows of requests that have rBlocks in host memory, one at a time.

  Its tables come with every step: the arrays beside the pool name no such row.
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
    self._programs = {
      (instance, num_tokens): LayeredPrograms(
        model=model,
        layer_def=layer_def,
        param_specs=specs,
        mesh=row,
        num_tokens=num_tokens,
        attention=attention,
      )
      for instance, row in zip(runner.instances, runner.row_meshes, strict=True)
      for num_tokens in self._buckets
    }
    # On the devices already: a step is many short programs.
    self._layers = [
      jax.device_put(
        list(np.arange(self._num_layers, dtype=np.int32)),
        NamedSharding(row, PartitionSpec()),
      )
      for row in runner.row_meshes
    ]

  def step(
    self, instance: InstanceId, uid: RequestUid, row: RowInput
  ) -> StepOutput:
    """Computes a row; blocks the host until its last slab may come.

    Args:
      instance: Whose request it is.
      uid: The request.
      row: One token, or a chunk of a prompt.

    Returns:
      Output of one row, still being computed.
    """
    slabs = self._tiers.held(instance, uid)
    name = "layered_decode" if len(row.token_ids) == 1 else "layered_prefill"
    output = self._launch(instance, [row], slabs, len(row.token_ids))
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
  ) -> StepOutput:
    bucket = self._buckets[num_tokens > 1]
    programs = self._programs[instance, bucket]
    own = self._runner.instances.index(instance)
    weights, kv_scales = self._runner.row_params[own]
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
      pool, q, state, covered = run(
        "front", mine, x, self._runner.pool.row(own), *read, tables
      )
      self._runner.pool.set_row(own, pool)
      for slab in slabs:
        staged = (stream.take(), slab.tag, slab.tables)
        state, covered = run("add", state, covered, q, *read, *staged)
        del staged  # Its room is that of the next one.
        stream.used(covered)
      x, proved = run("back", mine, x, batch, state, covered, proved)
    return run("end", weights, x, batch, proved)

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
