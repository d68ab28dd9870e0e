"""What managers ask of the data plane, as values.

The data plane carries effects out in the order in which a manager emits them.
"""

from collections.abc import Sequence

from infinite_llm.cache.content_tag import content_tag, content_tags
from infinite_llm.cache.rblock import Location
from infinite_llm.types import (
  BlockId,
  Epoch,
  InstanceId,
  RequestUid,
  Tier,
  value_type,
)


@value_type
class GrantEpochs:
  """A receiver's device is to accept payloads only under these epochs.

  Attributes:
    block_ids: rBlocks of the instance that emits this.
    epochs: Epoch of each; `NO_EPOCH` refuses every payload.
  """

  block_ids: tuple[BlockId, ...]
  epochs: tuple[Epoch, ...]


@value_type
class Move:
  """One full rBlock to send to another instance.

  Attributes:
    uid: Request that it belongs to.
    logical_id: Its number in the request.
    src_instance: Who holds it now: the owner, or a creditor whom it recalls.
    src_block: Its place there.
    src_tag: Content tag that it must have there.
    dst_instance: The creditor, or the owner.
    dst_block: Its place there.
    dst_epoch: Epoch under which that place was granted.
    dst_tag: Content tag that it has there.
  """

  uid: RequestUid
  logical_id: int
  src_instance: InstanceId
  src_block: BlockId
  src_tag: int
  dst_instance: InstanceId
  dst_block: BlockId
  dst_epoch: Epoch
  dst_tag: int


@value_type
class MoveBlocks:
  """rBlocks to send, as soon as the exchange has room.

  Attributes:
    moves: All from the instance that emits this to one other.
  """

  moves: tuple[Move, ...]


def full_block_move(
  uid: RequestUid, logical_id: int, old: Location, new: Location, filled: int
) -> Move:
  """Names the sending of a full rBlock from one place to another.

  Args:
    uid: Request that it belongs to.
    logical_id: Its number in the request.
    old: Where it lies.
    new: Where it is to lie.
    filled: P, tokens in it.

  Returns:
    The move, with the content tag that the rBlock has under each epoch.
  """
  src_tag, dst_tag = (
    content_tag(
      uid=uid, logical_id=logical_id, epoch=location.epoch, filled=filled
    )
    for location in (old, new)
  )
  return Move(
    uid=uid,
    logical_id=logical_id,
    src_instance=old.instance,
    src_block=old.block_id,
    src_tag=src_tag,
    dst_instance=new.instance,
    dst_block=new.block_id,
    dst_epoch=new.epoch,
    dst_tag=dst_tag,
  )


@value_type
class Swap:
  """One full rBlock to copy between the tiers of an instance.

  The data plane copies it only if it finds `src_tag` at the source; otherwise
  it leaves nothing at the destination that could be proved.

  Attributes:
    uid: Request that it belongs to.
    logical_id: Its number in the request.
    src_block: Its place in the tier that it is copied from.
    src_tag: Content tag that it must have there.
    dst_block: Its place in the tier that it is copied to.
    dst_tag: Content tag that it has there.
  """

  uid: RequestUid
  logical_id: int
  src_block: BlockId
  src_tag: int
  dst_block: BlockId
  dst_tag: int


@value_type
class SwapBlocks:
  """rBlocks to copy between tiers, to be acknowledged once all are copied.

  Attributes:
    to_tier: Where to; the sources lie in the other tier.
    swaps: All of one request, by rising logical number.
  """

  to_tier: Tier
  swaps: tuple[Swap, ...]


def swap_blocks(
  uid: RequestUid,
  old: Sequence[Location],
  new: Sequence[Location],
  block_size: int,
  logical_ids: Sequence[int] | None = None,
) -> SwapBlocks:
  """Names the copying of rBlocks of a request to the other tier.

  Args:
    uid: The request.
    old: Where they lie, in order; at least one.
    new: Where each is to lie.
    block_size: P, tokens in each.
    logical_ids: Their numbers in the request; None if they are its first.

  Returns:
    The effect, with the content tag that each rBlock has in either place.
  """
  numbers = range(len(old)) if logical_ids is None else logical_ids
  src_tags, dst_tags = (
    content_tags(
      uid=uid,
      logical_ids=numbers,
      epochs=[place.epoch for place in places],
      filled=block_size,
    )
    for places in (old, new)
  )
  return SwapBlocks(
    to_tier=new[0].tier,
    swaps=tuple(
      Swap(
        uid=uid,
        logical_id=logical_id,
        src_block=src.block_id,
        src_tag=src_tag,
        dst_block=dst.block_id,
        dst_tag=dst_tag,
      )
      for logical_id, src, src_tag, dst, dst_tag in zip(
        numbers, old, src_tags, new, dst_tags, strict=True
      )
    ),
  )


@value_type
class MigrateRequest:
  """A request that is to run on another instance from now on, with its KV.

  All of it is at home and at rest. Whoever runs the instances ends it here and
  begins it there; until then the books say that it runs here.

  Attributes:
    uid: The request.
    dst: The other instance.
  """

  uid: RequestUid
  dst: InstanceId


@value_type
class OverflowBlocks:
  """rBlocks to copy to HOST, where steps will attend them.

  To be acknowledged once all are copied.

  Attributes:
    uid: The request.
    swaps: By rising logical number.
  """

  uid: RequestUid
  swaps: tuple[Swap, ...]


@value_type
class DropOverflow:
  """Nobody attends what a request has in HOST any more.

  Copies that are still under way are acknowledged all the same.

  Attributes:
    uid: The request.
  """

  uid: RequestUid


type Effect = (
  GrantEpochs
  | MoveBlocks
  | SwapBlocks
  | OverflowBlocks
  | DropOverflow
  | MigrateRequest
)
