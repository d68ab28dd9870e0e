"""The exchange: rBlocks travel between instances inside one group program.

A payload carries the destination rBlock and the reservation epoch that the
creditor granted. The receiver writes it only if its device still holds that
epoch for that rBlock, so a late or repeated payload cannot hit an rBlock that
was given to somebody else (`DESIGN.md` section 5, rule 3). Nor can a repeated
one spoil the copy that it made, once its source holds something else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infinite_llm.cache.kv_pool import PoolArrays
from infinite_llm.types import INSTANCE_AXIS, NULL_BLOCK_ID
from pallas_kernels.copy_blocks.api import pack_blocks, unpack_blocks


class Payloads(NamedTuple):
  """What one instance sends to each other one; `Q` rBlocks at most per pair.

  Attributes:
    src_block: `[I, Q]` int32 own rBlock to send; the null block pads.
    src_tag: `[I, Q]` uint32 tag that it must carry, or its content is unproved.
    dst_block: `[I, Q]` int32 rBlock of the receiver; the null block pads.
    dst_epoch: `[I, Q]` uint32 reservation epoch of `dst_block`.
    dst_tag: `[I, Q]` uint32 tag of the content under the new epoch.
  """

  src_block: jax.Array
  src_tag: jax.Array
  dst_block: jax.Array
  dst_epoch: jax.Array
  dst_tag: jax.Array


def exchange(pool: PoolArrays, payloads: Payloads) -> PoolArrays:
  """Sends and receives rBlocks; runs inside `shard_map`.

  A block whose content is not what the books say does not arrive. Its place
  keeps tag 0, as granted, so that every later coverage check over it fails.

  Collective over axis: "instance".
  Donates: `pool`, updated in place.

  Args:
    pool: This instance's pool.
    payloads: What this instance sends.

  Returns:
    The pool with all accepted payloads written.
  """
  proved = pool.tag[payloads.src_block] == payloads.src_tag
  tag = jnp.where(proved, payloads.dst_tag, jnp.uint32(0))
  shape = payloads.src_block.shape
  blocks = pack_blocks(pool.kv, payloads.src_block.reshape(-1))
  blocks = blocks.reshape(*shape, *blocks.shape[1:])
  blocks, target, epoch, tag = jax.tree.map(
    lambda x: jax.lax.all_to_all(x, INSTANCE_AXIS, 0, 0),
    (blocks, payloads.dst_block, payloads.dst_epoch, tag),
  )
  blocks = blocks.reshape(-1, *blocks.shape[2:])
  target, epoch, tag = (x.reshape(-1) for x in (target, epoch, tag))
  is_granted = (target != 0) & (epoch != 0) & (pool.epoch[target] == epoch)
  accepted = is_granted & (tag != 0)
  out_of_bounds = pool.tag.shape[0]
  return pool._replace(
    kv=unpack_blocks(pool.kv, blocks, target, accepted),
    tag=pool.tag.at[jnp.where(accepted, target, out_of_bounds)].set(
      tag, mode="drop"
    ),
  )


def grant_epochs(
  pool: PoolArrays, block_ids: jax.Array, epochs: jax.Array
) -> PoolArrays:
  """Records under which epochs rBlocks may be received.

  A grant also clears the tag: what lay there before proves nothing for the new
  holder. A refusal leaves it, for what has arrived may be in use.

  Donates: `pool`, updated in place.

  Args:
    pool: This instance's pool.
    block_ids: `[G]` int32 rBlocks; the null block pads.
    epochs: `[G]` uint32 epoch of each; 0 refuses everything.

  Returns:
    The pool with the new epochs.
  """
  return pool._replace(
    epoch=pool.epoch.at[block_ids].set(
      jnp.where(block_ids == 0, jnp.uint32(0), epochs)
    ),
    tag=pool.tag.at[jnp.where(epochs != 0, block_ids, NULL_BLOCK_ID)].set(
      jnp.uint32(0)
    ),
  )
