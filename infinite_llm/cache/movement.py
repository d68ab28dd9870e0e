"""The exchange: rBlocks travel between instances inside group programs.

A payload carries the destination rBlock and the reservation epoch that the
creditor granted. The receiver writes it only if its device still holds that
epoch for that rBlock, so a late or repeated payload cannot hit an rBlock that
was given to somebody else (`DESIGN.md` section 5, rule 3). Nor can a repeated
one spoil the copy that it made, once its source holds something else.

Nothing on the devices decides what runs: a GPU has its host wait for what
chooses the branch of a conditional, and so for all programs before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from infinite_llm.cache.checksum import block_checksums
from infinite_llm.cache.kv_pool import PoolArrays
from infinite_llm.types import (
  INSTANCE_AXIS,
  NULL_BLOCK_ID,
  TENSOR_AXIS,
  Shift,
)
from pallas_kernels.copy_blocks.api import pack_blocks, unpack_blocks


class Payloads(NamedTuple):
  """What one instance sends to one other; `Q` rBlocks at most.

  Attributes:
    src_block: `[Q]` int32 own rBlock to send; the null block pads.
    src_tag: `[Q]` uint32 tag that it must carry, or its content is unproved.
    dst_block: `[Q]` int32 rBlock of the receiver; the null block pads.
    dst_epoch: `[Q]` uint32 reservation epoch of `dst_block`.
    dst_tag: `[Q]` uint32 tag of the content under the new epoch.
  """

  src_block: jax.Array
  src_tag: jax.Array
  dst_block: jax.Array
  dst_epoch: jax.Array
  dst_tag: jax.Array


class Arrivals(NamedTuple):
  """What an exchange that verifies moves tells of one instance.

  Attributes:
    block: `[1, 1, Q]` int32 rBlock that a payload was for.
    is_accepted: `[1, 1, Q]` bool. Whether it was written there.
    sent: `[1, 1, Q]` uint32 checksum of the tensor rank's part of it in the
      sender's pool, before it was packed.
    found: `[1, 1, Q]` uint32 the same of what then lay in the receiver's.
  """

  block: jax.Array
  is_accepted: jax.Array
  sent: jax.Array
  found: jax.Array


ARRIVAL_SPEC = PartitionSpec(INSTANCE_AXIS, TENSOR_AXIS)
"""Of each field of `Arrivals`: all instances and ranks are `[I, tensor, Q]`."""


def exchange(
  pool: PoolArrays, payloads: Payloads, shift: Shift, *, verify: bool = False
) -> tuple[PoolArrays, Arrivals | None]:
  """Sends and receives rBlocks; runs inside `shard_map`.

  Each instance i sends to i + shift. A block whose content is not what the
  books say does not arrive. Its place keeps tag 0, as granted, so that every
  later coverage check over it fails.

  What is sent and what is received is staged: 2 Q rBlocks in all.

  Collective over axis: "instance".
  Donates: `pool`, updated in place.

  Args:
    pool: This instance's pool.
    payloads: What this instance sends.
    shift: To whom, below the number of instances. Static, and the same on all.
    verify: Whether to compute checksums of both ends.

  Returns:
    The pool with all accepted payloads written, and what there is to compare;
    None unless it verifies.
  """
  num_instances = jax.lax.axis_size(INSTANCE_AXIS)
  is_proved = pool.tag[payloads.src_block] == payloads.src_tag
  tag = jnp.where(is_proved, payloads.dst_tag, jnp.uint32(0))
  words = (payloads.dst_block, payloads.dst_epoch, tag)
  if verify:
    words += (block_checksums(pool.kv, payloads.src_block),)
  # As one: NCCL takes 3 us longer for each array more.
  labels = jnp.stack([word.astype(jnp.uint32) for word in words])
  sent = pack_blocks(pool.kv, payloads.src_block), labels
  forth = [(i, (i + shift) % num_instances) for i in range(num_instances)]
  blocks, labels = jax.lax.ppermute(sent, INSTANCE_AXIS, forth)
  target, epoch, tag, *sums = labels[0].astype(jnp.int32), *labels[1:]
  accepted = _accepted(pool, target, epoch, tag)
  pool = _receive(pool, blocks, target, tag, accepted)
  if not verify:
    return pool, None
  (sent,) = sums
  found = block_checksums(pool.kv, target)
  arrivals = Arrivals(target, accepted, sent, found)
  return pool, Arrivals(*(field[None, None] for field in arrivals))


def _accepted(
  pool: PoolArrays, target: jax.Array, epoch: jax.Array, tag: jax.Array
) -> jax.Array:
  """Which payloads this instance's device still expects."""
  is_granted = (target != 0) & (epoch != 0) & (pool.epoch[target] == epoch)
  return is_granted & (tag != 0)


def _receive(
  pool: PoolArrays,
  blocks: jax.Array,
  target: jax.Array,
  tag: jax.Array,
  accepted: jax.Array,
) -> PoolArrays:
  """Writes payloads and their tags."""
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
