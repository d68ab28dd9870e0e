"""Books of one instance's rBlocks: who holds which, and what is free."""

import heapq

from infinite_llm.cache.rblock import BlockState, Location, RBlock
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.types import (
  NO_EPOCH,
  NULL_BLOCK_ID,
  BlockId,
  Epoch,
  InstanceId,
  PoolCounts,
  RequestUid,
  Tier,
)

_MAX_EPOCH = 2**32 - 1
_OWN_STATES = (BlockState.RESERVED, BlockState.LIVE, BlockState.MOVING)
_LENT_STATES = (BlockState.RESERVED, BlockState.HOSTED)


class BlockPool:
  """The rBlocks of one tier of an instance, for its requests and for others'.

  The first free block is taken: the one with the lowest id. Shortage is a
  value (None), a wrong call an `InvariantError` that tells the block's history.

  Attributes:
    instance: The instance that it belongs to.
    tier: Memory that the rBlocks lie in.
    num_changes: Rises with every change of a block; while it stays, so do all
      counts.
  """

  def __init__(
    self,
    instance: InstanceId,
    num_blocks: int,
    last_epoch: Epoch = NO_EPOCH,
    tier: Tier = Tier.HBM,
  ):
    """Makes a pool in which everything is free.

    Args:
      instance: The instance that it belongs to.
      num_blocks: rBlocks of the pool with the null block, at least 2.
      last_epoch: Epoch after which its own begin. A pool that takes the place
        of a lost one should begin beyond those, or a payload on its way to the
        lost one may be accepted.
      tier: Memory that the rBlocks lie in.

    Raises:
      ConfigError: If there is no block beside the null one.
    """
    if num_blocks < 2:
      raise ConfigError(f"num_blocks must be at least 2; got {num_blocks}.")
    self.instance = instance
    self.tier = tier
    self._num_blocks = num_blocks
    self._free = list(range(NULL_BLOCK_ID + 1, num_blocks))
    self._blocks: dict[BlockId, RBlock] = {}
    self._num_in = dict.fromkeys(BlockState, 0)
    self._num_in[BlockState.FREE] = num_blocks - 1
    self._num_lent = 0
    self.num_changes = 0
    self._last_epoch = last_epoch

  @property
  def num_free(self) -> int:
    """Blocks that nobody holds."""
    return self._num_in[BlockState.FREE]

  @property
  def num_lent(self) -> int:
    """Blocks hosted or reserved for other instances."""
    return self._num_lent

  @property
  def free_ids(self) -> tuple[BlockId, ...]:
    """The blocks that will be handed out, in no particular order."""
    return tuple(self._free)

  @property
  def is_conserved(self) -> bool:
    """Whether as many blocks can be had as are counted as free.

    In O(1), so that a simulation can ask after every event. The counts of all
    states add up by construction, but a free block is also in a list.
    """
    return (
      len(self._free) == self._num_in[BlockState.FREE]
      and min(self._num_in.values()) >= 0
    )

  def counts(self) -> PoolCounts:
    """How the blocks are used, without the null block."""
    num_in = self._num_in
    return PoolCounts(
      used=num_in[BlockState.LIVE] + num_in[BlockState.MOVING],
      free=num_in[BlockState.FREE],
      hosted=num_in[BlockState.HOSTED],
      reserved=num_in[BlockState.RESERVED],
      total=self._num_blocks - 1,
    )

  def is_from_the_future(self, epoch: Epoch) -> bool:
    """Whether no block can have been reserved under an epoch yet.

    Epochs begin anew after the last one, so half of them lie ahead.
    """
    return 0 < (epoch - self._last_epoch) % 2**32 < 2**31

  def block(self, block_id: BlockId) -> RBlock:
    """Metadata of one block, to look at.

    Raises:
      InvariantError: If the pool has no such block, or it is the null block.
    """
    if not NULL_BLOCK_ID < block_id < self._num_blocks:
      raise InvariantError(
        f"block_id must be in [1, {self._num_blocks}) on instance"
        f" {self.instance}; got {block_id}."
      )
    if block_id not in self._blocks:
      self._blocks[block_id] = RBlock(block_id=block_id)
    return self._blocks[block_id]

  def allocate(
    self, count: int, uid: RequestUid
  ) -> tuple[Location, ...] | None:
    """Reserves blocks for a request of this instance, all or none.

    Args:
      count: How many.
      uid: The request.

    Returns:
      Their locations, lowest id first, each under a new epoch; None if there
      are not enough.
    """
    return self._reserve(self.instance, uid, count)

  def mark_live(self, block_id: BlockId) -> None:
    """RESERVED to LIVE: an own block's content was proved."""
    block = self._own(block_id, (BlockState.RESERVED,), "make live")
    self._enter(block, BlockState.LIVE)

  def begin_move(self, block_id: BlockId) -> None:
    """LIVE to MOVING: a second copy is being made elsewhere."""
    block = self._own(block_id, (BlockState.LIVE,), "begin to move")
    self._enter(block, BlockState.MOVING)

  def cancel_move(self, block_id: BlockId) -> None:
    """MOVING to LIVE: this copy is the only one again."""
    block = self._own(block_id, (BlockState.MOVING,), "cancel the move of")
    self._enter(block, BlockState.LIVE)

  def free(self, block_id: BlockId, uid: RequestUid) -> None:
    """Takes back a block from a request of this instance.

    Args:
      block_id: RESERVED, LIVE or MOVING block.
      uid: The request that holds it.
    """
    block = self._own(block_id, _OWN_STATES, f"free for request {uid}")
    if block.uid != uid:
      raise self._wrong(block, f"free for request {uid}")
    self._release(block)

  def reserve_for(
    self, owner: InstanceId, uid: RequestUid, count: int
  ) -> tuple[Location, ...] | None:
    """Reserves blocks for a request of another instance, all or none.

    Args:
      owner: The instance that asks.
      uid: Its request.
      count: How many.

    Returns:
      The grants, lowest id first, each under a new epoch; None if there are
      not enough.
    """
    if owner == self.instance:
      raise InvariantError(
        f"Instance {owner} must not lend rBlocks to itself (request {uid})."
      )
    grants = self._reserve(owner, uid, count)
    self._num_lent += len(grants or ())
    return grants

  def commit_hosted(self, block_id: BlockId, epoch: Epoch) -> None:
    """RESERVED to HOSTED: another instance's KV arrived."""
    block = self._lent(block_id, epoch, (BlockState.RESERVED,), "commit")
    self._enter(block, BlockState.HOSTED)

  def release_hosted(self, block_id: BlockId, epoch: Epoch) -> None:
    """RESERVED or HOSTED to FREE: another instance gives a block back."""
    block = self._lent(block_id, epoch, _LENT_STATES, "release")
    self._release(block)
    self._num_lent -= 1

  def _reserve(
    self, owner: InstanceId, uid: RequestUid, count: int
  ) -> tuple[Location, ...] | None:
    if count < 0:
      raise InvariantError(f"count must not be negative; got {count}.")
    if count > self.num_free:
      return None
    return tuple(self._reserve_one(owner, uid) for _ in range(count))

  def _reserve_one(self, owner: InstanceId, uid: RequestUid) -> Location:
    block = self.block(heapq.heappop(self._free))
    self._last_epoch = self._last_epoch % _MAX_EPOCH + 1
    self._count(block, BlockState.RESERVED)
    block.reserve(owner, uid, self._last_epoch)
    return Location(
      instance=self.instance,
      block_id=block.block_id,
      epoch=block.epoch,
      tier=self.tier,
    )

  def _release(self, block: RBlock) -> None:
    self._count(block, BlockState.FREE)
    block.release()
    heapq.heappush(self._free, block.block_id)

  def _enter(self, block: RBlock, state: BlockState) -> None:
    self._count(block, state)
    block.enter(state)

  def _count(self, block: RBlock, state: BlockState) -> None:
    self.num_changes += 1
    self._num_in[block.state] -= 1
    self._num_in[state] += 1

  def _own(
    self, block_id: BlockId, states: tuple[BlockState, ...], action: str
  ) -> RBlock:
    block = self.block(block_id)
    if block.owner != self.instance or block.state not in states:
      raise self._wrong(block, action)
    return block

  def _lent(
    self,
    block_id: BlockId,
    epoch: Epoch,
    states: tuple[BlockState, ...],
    action: str,
  ) -> RBlock:
    block = self.block(block_id)
    is_lent = block.owner not in (None, self.instance)
    if not is_lent or block.epoch != epoch or block.state not in states:
      raise self._wrong(block, f"{action} under epoch {epoch} the hosted")
    return block

  def _wrong(self, block: RBlock, action: str) -> InvariantError:
    tier = "" if self.tier is Tier.HBM else f"{self.tier.name} "
    return InvariantError(
      f"Instance {self.instance} cannot {action} {tier}{block}."
    )
