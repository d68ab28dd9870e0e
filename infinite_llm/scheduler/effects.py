"""What managers ask of the data plane, as values.

The data plane carries effects out in the order in which a manager emits them.
"""

import dataclasses

from infinite_llm.types import BlockId, Epoch, InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrantEpochs:
  """A creditor's device is to accept payloads only under these epochs.

  Attributes:
    block_ids: rBlocks of the instance that emits this.
    epochs: Epoch of each; `NO_EPOCH` refuses every payload.
  """

  block_ids: tuple[BlockId, ...]
  epochs: tuple[Epoch, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Move:
  """One full rBlock to send to another instance.

  Attributes:
    uid: Request that it belongs to.
    logical_id: Its number in the request.
    src_instance: The owner, who holds it now.
    src_block: Its place there.
    src_tag: Content tag that it must have there.
    dst_instance: The creditor.
    dst_block: Its place there.
    dst_epoch: Epoch under which the creditor granted that place.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoveBlocks:
  """rBlocks to send, as soon as the exchange has room.

  Attributes:
    moves: All from the instance that emits this, to one creditor.
  """

  moves: tuple[Move, ...]


type Effect = GrantEpochs | MoveBlocks
