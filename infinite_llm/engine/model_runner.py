"""Owns what lies on the devices and launches programs over it.

One runner serves the instances of one process: it holds the parameters, the
pools and the hosted tables.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import HostedTables, SpillSlots
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.kv_pool import KVPool
from infinite_llm.cache.movement import Payloads
from infinite_llm.cache.rows import join_rows, place_rows, split_rows
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.mesh import row_mesh
from infinite_llm.engine import programs
from infinite_llm.engine.group_inputs import empty_hosted, shifts_in_use
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.engine.programs import GroupInputs, StepKind, StepOutput
from infinite_llm.engine.step_batch import (
  RowInput,
  StepBatch,
  build_batch,
  build_check,
)
from infinite_llm.errors import InvariantError
from infinite_llm.models.hf_loader import LoadedModel
from infinite_llm.types import INSTANCE_AXIS, NULL_BLOCK_ID, Epoch

_GRANT_BUCKET = 64


class ModelRunner:
  """Launches local and group programs; knows nothing of scheduling.

  Attributes:
    pool: The rBlock pools.
    programs: The compiled programs.
    launches: How often each kind of program was launched since warm-up.
  """

  def __init__(
    self,
    model: LoadedModel,
    config: EngineConfig,
    *,
    attention: str | None = None,
  ):
    """Places the pools; compiles nothing.

    Args:
      model: Parameters, sharded over the mesh of the lending group.
      config: Sizes of everything.
      attention: Name of the micro-attention; None picks.
    """
    self._config = config
    self._attention = attention
    self._mesh = mesh = model.mesh
    self.row_meshes = [row_mesh(mesh, i) for i in range(config.num_instances)]
    self._model = model
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, model.state)
    self._param_specs = specs
    self._row_params = [
      jax.tree.map(
        lambda leaf, spec, row=row: split_rows(leaf, [row], spec)[0],
        model.state,
        specs,
      )
      for row in self.row_meshes
    ]
    self.pool = KVPool(
      mesh,
      self.row_meshes,
      num_blocks=config.cache.num_blocks,
      num_layers=model.config.num_layers,
      num_kv_heads=model.config.num_kv_heads,
      block_size=config.cache.block_size,
      head_dim=model.config.head_dim,
      dtype=config.cache.kv_dtype or model.dtype,
    )
    self._hosted: list[HostedTables] = []
    for instance in range(config.num_instances):
      self._hosted.append(self._place(instance, self._empty_hosted()))
    self.programs = ProgramCache()
    self.launches: collections.Counter[str] = collections.Counter()

  def local_step(
    self,
    instance: int,
    rows: Sequence[RowInput],
    *,
    is_prefill: bool,
    bucket: int | None = None,
  ) -> StepOutput:
    """Computes rows of one instance whose rBlocks are all at home.

    Args:
      instance: Which instance.
      rows: At most as many as the largest bucket takes.
      is_prefill: Whether rows may have more than one token.
      bucket: Query tokens of the program; None picks the smallest that fits.

    Returns:
      Output of the instance alone, still being computed.
    """
    scheduler = self._config.scheduler
    buckets = (
      scheduler.prefill_buckets if is_prefill else scheduler.decode_buckets
    )
    bucket = bucket or _smallest_bucket([rows], buckets)
    num_rows = scheduler.prefill_rows if is_prefill else bucket
    batch = self._batch(rows, bucket, num_rows)
    kind = StepKind(is_group=False, is_prefill=is_prefill)
    name = "local_prefill" if is_prefill else "local_decode"
    pool, output = self.programs.run(
      (name, instance, bucket),
      lambda: self._build(kind, self.row_meshes[instance], bucket),
      (
        self._row_params[instance],
        self.pool.row(instance),
        self._place(instance, batch),
      ),
    )
    self.pool.set_row(instance, pool)
    self.launches[name] += 1
    return output

  def group_step(
    self,
    rows: Sequence[Sequence[RowInput]],
    slots: Sequence[SpillSlots],
    *,
    is_prefill: bool,
    bucket: int | None = None,
  ) -> list[StepOutput]:
    """Computes rows of all instances, some with rBlocks elsewhere.

    Args:
      rows: Rows of each instance; at most one each for a prefill chunk.
      slots: Spill slots of each instance, as numpy arrays.
      is_prefill: Whether rows may have more than one token.
      bucket: Query tokens of a prefill program; None picks the smallest that
        fits. A decode step has one row per spill slot.

    Returns:
      Output of each instance, still being computed.
    """
    if is_prefill:
      bucket = bucket or _smallest_bucket(
        rows, self._config.lending.group_prefill_buckets
      )
      num_rows = 1
    else:
      bucket = num_rows = self._config.lending.spill_slots
    batches = [self._batch(row, bucket, num_rows) for row in rows]
    kind = StepKind(is_group=True, is_prefill=is_prefill)
    name = "group_prefill" if is_prefill else "group_decode"
    pool, output = self.programs.run(
      (name, bucket),
      lambda: self._build(kind, self._mesh, bucket),
      (
        self._model.state,
        self.pool.group(),
        place_rows(batches, self._mesh, self.row_meshes),
        self._group_inputs(slots),
      ),
    )
    self.pool.set_group(pool)
    self.launches[name] += 1
    spec = PartitionSpec(INSTANCE_AXIS)
    split = (split_rows(leaf, self.row_meshes, spec) for leaf in output)
    return [StepOutput(*row) for row in zip(*split, strict=True)]

  def verify(
    self,
    tables: Sequence[Sequence[tuple[int, BlockTable, int]]],
    slots: Sequence[SpillSlots],
  ) -> np.ndarray:
    """Checks coverage of requests without computing anything.

    Blocks the host until the answer is there.

    Args:
      tables: `(slot, table, num_tokens)` of each request, per instance.
      slots: Spill slots of each instance; the row of slot s is s.

    Returns:
      `[I, S]` bool: whether what the slot's request reads is all there.
    """
    checks = [
      build_check(
        requests,
        num_rows=self._config.lending.spill_slots,
        table_capacity=self._config.cache.num_blocks,
        block_size=self._config.cache.block_size,
      )
      for requests in tables
    ]
    own, demand = place_rows(checks, self._mesh, self.row_meshes)
    proved = self.programs.run(
      ("verify",),
      lambda: programs.build_verify(self._mesh),
      (self.pool.group().tag, own, demand, self._group_inputs(slots)),
    )
    self.launches["verify"] += 1
    return np.asarray(proved).reshape(len(checks), -1)

  def exchange(self, payloads: Sequence[Payloads]) -> None:
    """Sends rBlocks between instances.

    Args:
      payloads: What each instance sends, as numpy arrays.
    """
    pool = self.programs.run(
      ("exchange",),
      lambda: programs.build_exchange(self._mesh),
      (
        self.pool.group(),
        place_rows(payloads, self._mesh, self.row_meshes),
      ),
    )
    self.pool.set_group(pool)
    self.launches["exchange"] += 1

  def grant_epochs(self, instance: int, epochs: Mapping[int, Epoch]) -> None:
    """Records under which epochs an instance's rBlocks may be received.

    Args:
      instance: The creditor.
      epochs: Epoch of each rBlock; `NO_EPOCH` refuses payloads.
    """
    for part in itertools.batched(epochs.items(), _GRANT_BUCKET):
      block_ids = np.full(_GRANT_BUCKET, NULL_BLOCK_ID, np.int32)
      values = np.zeros(_GRANT_BUCKET, np.uint32)
      block_ids[: len(part)] = [block_id for block_id, _ in part]
      values[: len(part)] = [epoch for _, epoch in part]
      pool = self.programs.run(
        ("grant_epochs", instance),
        lambda: programs.build_grant(self.row_meshes[instance]),
        (
          self.pool.row(instance),
          *self._place(instance, (block_ids, values)),
        ),
      )
      self.pool.set_row(instance, pool)
      self.launches["grant_epochs"] += 1

  def set_hosted(self, instance: int, tables: HostedTables) -> None:
    """Installs the tables of what an instance hosts.

    Args:
      instance: The creditor.
      tables: numpy leaves, shaped as `HostedTables` says.
    """
    self._hosted[instance] = self._place(instance, tables)

  def _build(self, kind: StepKind, mesh: Mesh, num_tokens: int):
    return programs.build_step(
      kind,
      self._model.graphdef,
      self._model.config,
      self._param_specs,
      mesh,
      num_tokens=num_tokens,
      attention=self._attention,
    )

  def _batch(
    self, rows: Sequence[RowInput], num_tokens: int, num_rows: int
  ) -> StepBatch:
    return build_batch(
      rows,
      num_tokens=num_tokens,
      num_rows=num_rows,
      table_capacity=self._config.cache.num_blocks,
      block_size=self._config.cache.block_size,
    )

  def _place(self, instance: int, tree):
    row = self.row_meshes[instance]
    return place_rows([tree], row, [row])

  def _group_inputs(self, slots: Sequence[SpillSlots]) -> GroupInputs:
    spec = PartitionSpec(INSTANCE_AXIS)
    return GroupInputs(
      hosted=jax.tree.map(
        lambda *leaves: join_rows(leaves, self._mesh, spec), *self._hosted
      ),
      slots=place_rows(slots, self._mesh, self.row_meshes),
      holders=jax.device_put(
        shifts_in_use(slots), NamedSharding(self._mesh, PartitionSpec())
      ),
    )

  def _empty_hosted(self) -> HostedTables:
    num_rows = self._config.num_instances * self._config.lending.spill_slots
    return empty_hosted(num_rows, self._config.cache.num_blocks)


def _smallest_bucket(
  rows: Sequence[Sequence[RowInput]], buckets: Sequence[int]
) -> int:
  """Smallest bucket that takes the rows of every instance."""
  needed = max(sum(len(row.token_ids) for row in batch) for batch in rows)
  for bucket in buckets:
    if needed <= bucket:
      return bucket
  raise InvariantError(
    f"A step of {needed} tokens was planned, but the largest bucket takes"
    f" {buckets[-1]}."
  )
