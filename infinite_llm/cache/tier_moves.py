"""Device half of tier moves: rBlocks leave and enter a pool in HBM.

These are the short programs at the HBM end; the copies over the link to host
memory are transfers beside all programs (`cache/host_pool.py`). As with the
exchange, what does not hold what the books say arrives as tag 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.cache.checksum import block_checksums, checksum
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.types import INSTANCE_AXIS, NULL_BLOCK_ID, TENSOR_AXIS
from pallas_kernels.copy_blocks.api import pack_blocks, unpack_blocks

_REPLICATED = PartitionSpec()
_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)  # Of which a row has one.


class TierBatch(NamedTuple):
  """Which rBlocks one program moves; `Q` at most.

  Attributes:
    src_block: `[Q]` int32 place in the tier that it is copied from.
    src_tag: `[Q]` uint32 tag that it must carry there, never 0.
    dst_block: `[Q]` int32 place in the other tier; the null block pads.
    dst_tag: `[Q]` uint32 tag of the same content there.
  """

  src_block: jax.Array
  src_tag: jax.Array
  dst_block: jax.Array
  dst_tag: jax.Array


class Checks(NamedTuple):
  """What a program that verifies moves tells of the HBM end.

  Attributes:
    is_proved: `[Q]` bool. Whether the source held what it should.
    sums: `[tensor, Q]` uint32 checksum of each rank's part of each rBlock.
  """

  is_proved: jax.Array
  sums: jax.Array


_PER_RANK = PartitionSpec(TENSOR_AXIS)
_CHECK_SPECS = Checks(_REPLICATED, _PER_RANK)

Blocks = tuple[jax.Array, ...]
"""rBlocks, an array `[1, L, 2, K, P, D]` each."""


def build_leave(
  mesh: Mesh, batch_blocks: int, *, verify: bool
) -> Callable[..., tuple[Blocks, jax.Array, Checks | None]]:
  """Builds the program that copies rBlocks out of a pool.

  Args:
    mesh: Row of the instance.
    batch_blocks: Q.
    verify: Whether to compute checksums.

  Returns:
    Jitted `(kv, tag, host_tag, batch) -> (blocks, host_tag, checks)`, where
    `batch` is a packed `TierBatch`. Donates nothing: the pool is only read.
  """

  def body(kv, tag, host_tag, batch):
    batch = batch.own()
    is_proved = tag[batch.src_block] == batch.src_tag
    blocks = _pack_each(kv, batch.src_block)
    host_tag = _set_tags(host_tag, batch, is_proved)
    checks = _checks(kv, batch.src_block, is_proved) if verify else None
    return blocks, host_tag, checks

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(POOL_SPECS.kv, POOL_SPECS.tag, _REPLICATED, _PER_INSTANCE),
      out_specs=(
        (POOL_SPECS.kv,) * batch_blocks,
        _REPLICATED,
        _CHECK_SPECS if verify else None,
      ),
      check_vma=False,
    )
  )


def build_enter(
  mesh: Mesh, batch_blocks: int, *, verify: bool
) -> Callable[..., tuple[PoolArrays, Checks | None]]:
  """Builds the program that copies rBlocks into a pool.

  Args:
    mesh: Row of the instance.
    batch_blocks: Q.
    verify: Whether to compute checksums of what then lies in the pool.

  Returns:
    Jitted `(pool, host_tag, batch, blocks) -> (pool, checks)`, where `batch` is
    a packed `TierBatch`. Donates `pool`.
  """

  def body(pool, host_tag, batch, blocks):
    batch = batch.own()
    is_proved = host_tag[batch.src_block] == batch.src_tag
    is_wanted = is_proved & (batch.dst_block != NULL_BLOCK_ID)
    pool = pool._replace(
      kv=_unpack_each(pool.kv, blocks, batch.dst_block, is_wanted),
      tag=_set_tags(pool.tag, batch, is_proved),
    )
    if not verify:
      return pool, None
    return pool, _checks(pool.kv, batch.dst_block, is_proved)

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(
        POOL_SPECS,
        _REPLICATED,
        _PER_INSTANCE,
        (POOL_SPECS.kv,) * batch_blocks,
      ),
      out_specs=(POOL_SPECS, _CHECK_SPECS if verify else None),
      check_vma=False,
    ),
    donate_argnums=(0,),
  )


def build_leave_as_slab(
  mesh: Mesh, *, verify: bool = False
) -> Callable[..., tuple[Blocks, jax.Array, jax.Array | None]]:
  """Builds the program that takes rBlocks out of a pool layer by layer.

  Args:
    mesh: Row of the instance.
    verify: Whether to compute checksums.

  Returns:
    Jitted `(kv, tag, batch) -> (layers, slab_tag, sums)`, where `batch` is a
    packed `TierBatch`: for each layer the `Q` rBlocks of the batch as `[1 + Q,
    1, 2, K, P, D]`, behind a null block, `[1 + Q]` uint32 what they hold, and,
    if it verifies, `[tensor, L]` uint32 checksums of each rank's part of each
    layer where it lay in the pool. Destinations of the batch mean nothing.
    Donates nothing: the pool is only read.
  """

  def body(kv, tag, batch):
    batch = batch.own()
    is_proved = tag[batch.src_block] == batch.src_tag
    slab_tag = jnp.where(is_proved, batch.dst_tag, jnp.uint32(0))
    null = jnp.full(1, NULL_BLOCK_ID, jnp.int32)
    block_ids = jnp.concatenate([null, batch.src_block])
    layers = pack_by_layer(kv, block_ids)
    slab_tag = jnp.concatenate([jnp.zeros(1, jnp.uint32), slab_tag])
    if not verify:
      return layers, slab_tag, None
    sums = [checksum(kv[block_ids, layer]) for layer in range(len(layers))]
    return layers, slab_tag, jnp.stack(sums)[None]

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(POOL_SPECS.kv, POOL_SPECS.tag, _PER_INSTANCE),
      out_specs=(
        POOL_SPECS.kv,
        POOL_SPECS.tag,
        _PER_RANK if verify else None,
      ),
      check_vma=False,
    )
  )


def build_slab_sum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Builds the program that sums what came of a slab, where moves are verified.

  Args:
    mesh: Row of the instance.

  Returns:
    Jitted `part -> sums`: `[tensor]` uint32 checksum of each rank's part of a
    layer of a slab, `[1 + Q, 1, 2, K, P, D]` in HBM.
  """
  return jax.jit(
    jax.shard_map(
      lambda part: checksum(part)[None],
      mesh=mesh,
      in_specs=POOL_SPECS.kv,
      out_specs=_PER_RANK,
      check_vma=False,
    )
  )


def pack_by_layer(kv: jax.Array, block_ids: jax.Array) -> Blocks:
  """Copies rBlocks, and takes them apart by layer.

  Args:
    kv: `[N, L, 2, K, P, D]` pool.
    block_ids: `[Q]` int32 rBlocks.

  Returns:
    For each layer `[Q, 1, 2, K, P, D]`.
  """
  packed = pack_blocks(kv, block_ids)
  return tuple(
    jax.lax.slice_in_dim(packed, layer, layer + 1, axis=1)
    for layer in range(packed.shape[1])
  )


def _pack_each(kv: jax.Array, block_ids: jax.Array) -> Blocks:
  """Copies each rBlock into an array of its own: what a transfer takes."""
  return tuple(
    pack_blocks(kv, block_ids[q : q + 1]) for q in range(block_ids.shape[0])
  )


def _unpack_each(
  kv: jax.Array,
  blocks: Sequence[jax.Array],
  block_ids: jax.Array,
  valid: jax.Array,
) -> jax.Array:
  for q, block in enumerate(blocks):
    kv = unpack_blocks(kv, block, block_ids[q : q + 1], valid[q : q + 1])
  return kv


def _set_tags(
  tag: jax.Array, batch: TierBatch, is_proved: jax.Array
) -> jax.Array:
  """Names what arrives; nothing is proved of what was not there."""
  is_padding = batch.dst_block == NULL_BLOCK_ID
  where = tag.at[jnp.where(is_padding, tag.shape[0], batch.dst_block)]
  return where.set(
    jnp.where(is_proved, batch.dst_tag, jnp.uint32(0)), mode="drop"
  )


def _checks(
  kv: jax.Array, block_ids: jax.Array, is_proved: jax.Array
) -> Checks:
  return Checks(is_proved, block_checksums(kv, block_ids)[None])
