"""The rBlock pools on the devices, and what they prove about their content."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.cache import rows as mesh_rows
from infinite_llm.cache.device_memory import free_bytes
from infinite_llm.cache.table_store import EntryWrites, table_capacity
from infinite_llm.errors import ConfigError
from infinite_llm.types import TENSOR_AXIS
from pallas_kernels.micro_attention.api import BlockTables
from pallas_kernels.pool_layout import held_dtype


class PoolArrays(NamedTuple):
  """Pool of one instance, or of all of them along the first axis.

  Attributes:
    kv: `[N, L, 2, K, P, D]` keys (0) and values (1) of all rBlocks; those of
      float8_e4m3fn are uint8.
    tag: `[N]` uint32. Content tag of each rBlock; 0 proves nothing.
    epoch: `[N]` uint32. Reservation epoch under which a block may be received
      from another instance; 0 refuses every payload.
    block_ids: `[E]` int32. rBlocks of all tables over this pool, those of the
      instance's own requests and those hosted for others, as `TableStore` lays
      them out.
    logical_ids: `[E]` int32. Number of each in its request.
  """

  kv: jax.Array
  tag: jax.Array
  epoch: jax.Array
  block_ids: jax.Array
  logical_ids: jax.Array

  def tables(self, starts: jax.Array, counts: jax.Array) -> BlockTables:
    """Tables of `B` rows, from `[B]` int32 starts and counts."""
    return BlockTables(self.block_ids, self.logical_ids, starts, counts)


POOL_SPECS = PoolArrays(
  kv=PartitionSpec("instance", None, None, "tensor"),
  tag=PartitionSpec("instance"),
  epoch=PartitionSpec("instance"),
  block_ids=PartitionSpec("instance"),
  logical_ids=PartitionSpec("instance"),
)


class KVPool:
  """Owns the pool buffers of all instances of this process.

  Programs take the pool donated and give it back; only the newest wrapper is
  held, so a buffer that a program consumed can never be read by mistake.
  """

  def __init__(
    self,
    mesh: Mesh,
    rows: Sequence[Mesh],
    *,
    num_blocks: int,
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
  ):
    """Allocates empty pools: zero KV, zero tags.

    Args:
      mesh: ("instance", "tensor") mesh of the lending group.
      rows: Row meshes of the instances.
      num_blocks: N, rBlocks per instance with the null block.
      num_layers: L.
      num_kv_heads: K over all tensor ranks, a multiple of them.
      block_size: P, tokens per rBlock.
      head_dim: D.
      dtype: Dtype of keys and values.

    Raises:
      ConfigError: If the devices have no room for them.
    """
    self._mesh = mesh
    num_entries = table_capacity(num_blocks)
    shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)

    def empty() -> PoolArrays:
      return PoolArrays(
        kv=jnp.zeros(shape, held_dtype(dtype)),
        tag=jnp.zeros((num_blocks,), jnp.uint32),
        epoch=jnp.zeros((num_blocks,), jnp.uint32),
        block_ids=jnp.zeros((num_entries,), jnp.int32),
        logical_ids=jnp.zeros((num_entries,), jnp.int32),
      )

    pool_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    device_bytes = pool_bytes // mesh.shape[TENSOR_AXIS]
    free = free_bytes([device for row in rows for device in row.devices.flat])
    no_room = ConfigError(
      f"num_blocks x block_size must fit on the devices; got {num_blocks} x"
      f" {block_size}, which takes {device_bytes} bytes of each, more than is"
      f" free{'' if free is None else f' ({free})'}."
    )
    # Asked before, since some systems grant any amount until it is written to;
    # and XLA cannot even name a shape beyond 2**63 bytes.
    if pool_bytes >= 2**63 or (free is not None and device_bytes > free):
      raise no_room
    try:
      self._rows = [
        jax.jit(
          empty,
          out_shardings=jax.tree.map(
            lambda spec, row=row: NamedSharding(row, spec), POOL_SPECS
          ),
        )()
        for row in rows
      ]
      jax.block_until_ready(self._rows)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise no_room from error
    self._row_meshes = rows

  @property
  def block_bytes(self) -> int:
    """Bytes of the KV of one rBlock over all tensor ranks."""
    kv = self._rows[0].kv
    return kv.nbytes // kv.shape[0]

  def row(self, index: int) -> PoolArrays:
    """The pool of the `index`-th instance of this process."""
    return self._rows[index]

  def set_row(self, index: int, arrays: PoolArrays) -> None:
    """Takes back what a local program returned."""
    self._rows[index] = arrays

  def group(self) -> PoolArrays:
    """All pools as one array over the mesh, made of the same buffers."""
    return jax.tree.map(
      lambda spec, *rows: mesh_rows.join_rows(rows, self._mesh, spec),
      POOL_SPECS,
      *self._rows,
    )

  def set_group(self, arrays: PoolArrays) -> None:
    """Takes back what a group program returned."""
    split = jax.tree.map(
      lambda spec, array: mesh_rows.split_rows(array, self._row_meshes, spec),
      POOL_SPECS,
      arrays,
    )
    self._rows = [PoolArrays(*row) for row in zip(*split, strict=True)]


def write_entries(pool: PoolArrays, writes: EntryWrites) -> PoolArrays:
  """Brings the table entries beside a pool up to date.

  Donates: `pool`, updated in place.

  Args:
    pool: One instance's pool.
    writes: `[W]` each, as `TableStore.take_writes` gave them, on the device.

  Returns:
    The pool with the new entries.
  """
  return pool._replace(
    block_ids=pool.block_ids.at[writes.at].set(writes.block_ids, mode="drop"),
    logical_ids=pool.logical_ids.at[writes.at].set(
      writes.logical_ids, mode="drop"
    ),
  )


def mix_tags(tag: jax.Array, logical_ids: jax.Array) -> jax.Array:
  """Device half of `content_tag.mix_tag`: elementwise uint32."""
  return _avalanche(
    tag ^ _avalanche(logical_ids.astype(jnp.uint32) + jnp.uint32(0x51ED270B))
  )


def coverage(tag: jax.Array, tables: BlockTables) -> jax.Array:
  """Sums what the rBlocks in each row's table really hold.

  Args:
    tag: `[N]` uint32 content tags of this device's pool.
    tables: Tables of `B` rows with `E` entries in all.

  Returns:
    `[B]` uint32: sum of the mixed tags of each row's rBlocks, modulo 2**32.
  """
  mixed = mix_tags(tag[tables.block_ids], tables.logical_ids)
  # Differences of a wrapping prefix sum are exact modulo 2**32, whatever the
  # rows are: no segment ids, no padding to the longest row.
  total = jnp.cumsum(mixed, dtype=jnp.uint32)
  total = jnp.concatenate([jnp.zeros((1,), jnp.uint32), total])
  return total[tables.starts + tables.counts] - total[tables.starts]


def _avalanche(x: jax.Array) -> jax.Array:
  x ^= x >> 16
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
