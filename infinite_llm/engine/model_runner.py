"""Owns what lies on the devices and launches programs over it.

One runner serves the instances of one process: it holds the parameters and the
pools, and brings the tables on the devices up to date.
"""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import HostedRows, SpillSlots
from infinite_llm.cache.kv_pool import KVPool, PoolArrays
from infinite_llm.cache.movement import ARRIVAL_SPEC, Arrivals, Payloads
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.rows import join_rows, split_fields, split_rows
from infinite_llm.cache.table_store import EntryWrites
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.mesh import own_instances, row_mesh
from infinite_llm.engine import programs
from infinite_llm.engine.group_inputs import fill_granted, shifts_of_slots
from infinite_llm.engine.instance_tables import InstanceTables
from infinite_llm.engine.kv_scales import place_kv_scales
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.engine.programs import GroupInputs, StepKind, StepOutput
from infinite_llm.engine.step_batch import (
  CheckRow,
  RowInput,
  StepBatch,
  build_batch,
  build_check,
  max_writes,
  pad_writes,
  smallest_bucket,
)
from infinite_llm.models.hf_loader import LoadedModel
from infinite_llm.models.transformer import pool_kv_heads
from infinite_llm.scheduler.hosted_tables import HostedVersion
from infinite_llm.types import INSTANCE_AXIS, Epoch, Shift

_GRANT_BUCKET = 64
_WRITE_BUCKET = 4096
_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)


class ModelRunner:
  """Launches local and group programs; knows nothing of scheduling.

  Everything by instance is of this process's instances alone, in their order;
  where a single one is meant, it is named by its number in the whole group.

  Attributes:
    model: What is run.
    instances: Numbers of this process's instances.
    row_meshes: The row of the mesh of each.
    params: What steps of the whole group read.
    row_params: The same of each instance's row.
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
    self.instances = own_instances(mesh)
    self.row_meshes = [row_mesh(mesh, i) for i in self.instances]
    self.model = model
    scales = place_kv_scales(model, config)
    self.params = params = programs.Params(model.state, scales)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    self._param_specs = specs
    self.row_params = [
      jax.tree.map(
        lambda leaf, spec, row=row: split_rows(leaf, [row], spec)[0],
        params,
        specs,
      )
      for row in self.row_meshes
    ]
    self.pool = KVPool(
      mesh,
      self.row_meshes,
      num_blocks=config.cache.num_blocks,
      num_layers=model.config.num_layers,
      num_kv_heads=pool_kv_heads(model.config, config.tensor_parallel),
      block_size=config.cache.block_size,
      head_dim=model.config.head_dim,
      dtype=config.cache.kv_dtype or model.dtype,
    )
    self._tables = [InstanceTables(config) for _ in self.instances]
    self._hosted_rows = [
      self._place(instance, tables.hosted_rows())
      for instance, tables in zip(self.instances, self._tables, strict=True)
    ]
    tokens = np.zeros(config.scheduler.max_num_seqs, np.int32)
    self._no_tokens = [
      jax.device_put(tokens, NamedSharding(row, PartitionSpec()))
      for row in self.row_meshes
    ]
    self.programs = ProgramCache()
    self.launches: collections.Counter[str] = collections.Counter()

  def local_step(
    self,
    instance: int,
    rows: Sequence[RowInput],
    *,
    is_prefill: bool,
    bucket: int | None = None,
    newest: jax.Array | None = None,
  ) -> StepOutput:
    """Computes rows of one instance whose rBlocks are all at home.

    Args:
      instance: Which instance.
      rows: At most as many as the largest bucket takes.
      is_prefill: Whether rows may have more than one token, all known.
      newest: `[max_num_seqs]` int32 of the sampler; None if all are known.
      bucket: Query tokens of the program; None picks the smallest that fits.

    Returns:
      Output of the instance alone, still being computed.
    """
    scheduler = self._config.scheduler
    buckets = (
      scheduler.prefill_buckets if is_prefill else scheduler.decode_buckets
    )
    bucket = bucket or smallest_bucket([rows], buckets)
    num_rows = scheduler.prefill_rows if is_prefill else bucket
    batch = self._batch(instance, rows, bucket, num_rows)
    own = self._own(instance)
    newest = self._no_tokens[own] if newest is None else newest
    kind = StepKind(is_group=False, is_prefill=is_prefill)
    args = self.row_params[own], self.pool.row(own)
    args += (self._place(instance, batch),)
    pool, output = self.programs.run(
      (kind.name, instance, bucket),
      lambda: self._build(kind, self.row_meshes[own], bucket),
      args if is_prefill else (*args, newest),
    )
    self.pool.set_row(own, pool)
    self.launches[kind.name] += 1
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
        fits. A decode step has as many rows as the largest local one, so that
        rows with all rBlocks at home may be in it.

    Returns:
      Output of each instance, still being computed.
    """
    if is_prefill:
      bucket = bucket or smallest_bucket(
        rows, self._config.lending.group_prefill_buckets
      )
      num_rows = 1
    else:
      bucket = num_rows = self._config.scheduler.decode_buckets[-1]
    batches = [
      self._batch(instance, mine, bucket, num_rows)
      for instance, mine in zip(self.instances, rows, strict=True)
    ]
    group = self.answering(slots)
    placed = place_rows(batches, self._mesh, self.row_meshes)
    kind = StepKind(is_group=True, is_prefill=is_prefill)
    pool, output = self.programs.run(
      (kind.name, bucket),
      lambda: self._build(kind, self._mesh, bucket),
      (self.params, self.pool.group(), placed, group),
    )
    self.pool.set_group(pool)
    self.launches[kind.name] += 1
    split = split_fields(output, self.row_meshes, _PER_INSTANCE)
    return [StepOutput(*row) for row in split]

  def verify(
    self,
    checks: Sequence[Sequence[CheckRow]],
    slots: Sequence[SpillSlots],
  ) -> list[jax.Array]:
    """Checks coverage of requests without computing anything.

    Args:
      checks: Requests of each instance, each in the row of its spill slot.
      slots: Spill slots of each instance; the row of slot s is s.

    Returns:
      `[S]` bool of each instance, still being computed: whether what the slot's
      request reads is all there.
    """
    batches = [
      build_check(
        mine,
        tables.sync([check.entries() for check in mine]),
        self._config.lending.spill_slots,
      )
      for tables, mine in zip(self._tables, checks, strict=True)
    ]
    group = self.answering(slots)
    pool = self.pool.group()
    proved = self.programs.run(
      ("verify",),
      lambda: programs.build_verify(self._mesh),
      (
        pool.tag,
        pool.block_ids,
        pool.logical_ids,
        place_rows(batches, self._mesh, self.row_meshes),
        group,
      ),
    )
    self.launches["verify"] += 1
    return split_rows(proved, self.row_meshes, _PER_INSTANCE)

  def exchange(
    self, shift: Shift, payloads: Sequence[Payloads]
  ) -> list[Arrivals]:
    """Sends rBlocks from each instance to the one that comes `shift` after it.

    Args:
      shift: In [1, I).
      payloads: What each instance sends, as numpy arrays, all of one quota.

    Returns:
      What each received, still being computed; empty unless moves are verified.
    """
    quota = len(payloads[0].src_block)
    verify = self._config.cache.verify_moves
    pool, arrivals = self.programs.run(
      ("exchange", shift, quota),
      lambda: programs.build_exchange(self._mesh, shift, verify=verify),
      (self.pool.group(), place_rows(payloads, self._mesh, self.row_meshes)),
    )
    self.pool.set_group(pool)
    self.launches["exchange"] += 1
    split = split_fields(arrivals or (), self.row_meshes, ARRIVAL_SPEC)
    return [Arrivals(*row) for row in split]

  def grant_epochs(self, instance: int, epochs: Mapping[int, Epoch]) -> None:
    """Records under which epochs an instance's rBlocks may be received.

    Args:
      instance: The creditor.
      epochs: Epoch of each rBlock; `NO_EPOCH` refuses payloads.
    """
    for part in itertools.batched(epochs.items(), _GRANT_BUCKET):
      granted = fill_granted(part, _GRANT_BUCKET)
      self._write("grant_epochs", instance, programs.build_grant, granted)

  def write_entries(self, instance: int) -> None:
    """Writes the table entries that an instance's devices lack.

    Steps bring a few themselves; this is for more than they take. Launches a
    program even if nothing is to be written.

    Args:
      instance: Whose devices.
    """
    writes = self._tables[self._own(instance)].take_writes()
    for begin in range(0, max(len(writes.at), 1), _WRITE_BUCKET):
      part = EntryWrites(*(x[begin : begin + _WRITE_BUCKET] for x in writes))
      part = pad_writes(part, _WRITE_BUCKET)
      self._write("write_entries", instance, programs.build_write_entries, part)

  def set_hosted(
    self, instance: int, versions: tuple[HostedVersion, ...]
  ) -> None:
    """Has group programs answer with these tables from now on.

    Args:
      instance: The creditor.
      versions: All versions that an owner may name.
    """
    self._tables[self._own(instance)].set_hosted(versions)
    self._upload_moved(instance)

  def upload_hosted(self, instance: int, rows: HostedRows) -> None:
    """Tells an instance's devices where they find what it hosts.

    Args:
      instance: The creditor.
      rows: numpy leaves.
    """
    self._hosted_rows[self._own(instance)] = self._place(instance, rows)

  def answering(self, slots: Sequence[SpillSlots]) -> GroupInputs:
    """What a group program reads, once all table entries have their places.

    Args:
      slots: Spill slots of each instance, as numpy arrays.
    """
    for instance, tables in zip(self.instances, self._tables, strict=True):
      if tables.num_pending:  # No step brings them.
        self.write_entries(instance)
      self._upload_moved(instance)
    named = [
      (mine, shifts_of_slots(instance, mine))
      for instance, mine in zip(self.instances, slots, strict=True)
    ]
    return GroupInputs(
      hosted=jax.tree.map(
        lambda *leaves: join_rows(leaves, self._mesh, _PER_INSTANCE),
        *self._hosted_rows,
      ),
      slots=place_rows(named, self._mesh, self.row_meshes),
    )

  def _write(
    self,
    name: str,
    instance: int,
    build: Callable[[Mesh], Callable[..., PoolArrays]],
    tree: tuple[np.ndarray, ...],
  ) -> None:
    own = self._own(instance)
    pool = self.programs.run(
      (name, instance),
      lambda: build(self.row_meshes[own]),
      (self.pool.row(own), self._place(instance, tree)),
    )
    self.pool.set_row(own, pool)
    self.launches[name] += 1

  def _build(self, kind: StepKind, mesh: Mesh, num_tokens: int):
    return programs.build_step(
      kind,
      self.model.graphdef,
      self.model.config,
      self._param_specs,
      mesh,
      num_tokens=num_tokens,
      attention=self._attention,
    )

  def _batch(
    self,
    instance: int,
    rows: Sequence[RowInput],
    num_tokens: int,
    num_rows: int,
  ) -> StepBatch:
    tables = self._tables[self._own(instance)]
    block_size = self._config.cache.block_size
    starts = tables.sync([row.entries() for row in rows])
    if tables.num_pending > max_writes(num_tokens, num_rows, block_size):
      self.write_entries(instance)
    return build_batch(
      rows,
      starts,
      tables.take_writes(),
      num_tokens=num_tokens,
      num_rows=num_rows,
      block_size=block_size,
    )

  def _own(self, instance: int) -> int:
    """Which of this process's instances one is."""
    return self.instances.index(instance)

  def _place(self, instance: int, tree):
    row = self.row_meshes[self._own(instance)]
    return place_rows([tree], row, [row])

  def _upload_moved(self, instance: int) -> None:
    rows = self._tables[self._own(instance)].take_moved()
    if rows is not None:
      self.upload_hosted(instance, rows)
