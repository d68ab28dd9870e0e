"""The HOST tier of one instance: rBlocks in pinned host memory.

Each rBlock is an array of its own. A transfer makes a new array and never
writes into an old one, so nothing waits for readers of the old one, and a short
copy of something else, such as sampled tokens, waits for one rBlock on the
link at most. All are equally large, so those that go leave room for those that
come.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.cache.checksum import checksum
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import PackedRows, place_rows
from infinite_llm.cache.tier_moves import (
  Checks,
  TierBatch,
  build_enter,
  build_leave,
)
from infinite_llm.errors import InvariantError
from infinite_llm.types import NULL_BLOCK_ID, BlockId, Tier

BATCH_BLOCKS = 16
"""rBlocks of a batch, unless told otherwise."""

BATCHES_UNDER_WAY = 3
"""Batches under way in each direction: one waits for the step that was computed
when it was asked for, as transfers do, one is on the link, and one is to be
ended. Each stages its rBlocks in HBM."""

_LAUNCHED_AT_ONCE = 4
"""Transfers that JAX is asked for together, behind a first one: of a list, none
begins before all are prepared, which takes the host a third to two thirds of an
rBlock's time on the link; one by one they take as long as there."""

STAGING_BLOCKS = 2 * BATCHES_UNDER_WAY * BATCH_BLOCKS + 1
"""rBlocks of HBM that a HOST pool needs: batches in both directions, and one
that pads them."""

Run = Callable[[Hashable, Callable[[], Any], tuple[Any, ...]], Any]
"""Runs a program by its key; builds it if it is new (`ProgramCache.run`)."""


class TierMove(Protocol):
  """One full rBlock to copy between the tiers; `effects.Swap` is one."""

  @property
  def src_block(self) -> BlockId:
    """Its place in the tier that it is copied from."""
    ...

  @property
  def src_tag(self) -> int:
    """Content tag that it must have there."""
    ...

  @property
  def dst_block(self) -> BlockId:
    """Its place in the tier that it is copied to."""
    ...

  @property
  def dst_tag(self) -> int:
    """Content tag that it has there."""
    ...


class Copy:
  """rBlocks on their way to the other tier.

  Attributes:
    to_tier: Where to.
  """

  def __init__(self, to_tier: Tier, num_blocks: int):
    """Notes how many there are."""
    self.to_tier = to_tier
    self._num_left = num_blocks

  @property
  def is_done(self) -> bool:
    """Whether all copies are there, for programs launched from now on."""
    return not self._num_left

  def end_one(self) -> None:
    """Notes that one rBlock more is done."""
    self._num_left -= 1


class _Part(NamedTuple):
  """One move, and the copy that it is part of."""

  copy: Copy
  move: TierMove


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
  """Moves that share a program.

  Attributes:
    parts: The moves.
    placed: The same for the program at the HBM end, which comes before the
      transfer of those that leave and behind that of those that enter.
    arrays: What the transfer makes of each, in host memory or in HBM.
    checks: What the program told of the HBM end; None for one that enters, and
      where moves are not verified.
  """

  parts: Sequence[_Part]
  placed: PackedRows[TierBatch]
  arrays: Sequence[jax.Array]
  checks: Checks | None = None

  def is_over(self) -> bool:
    # JAX declares `is_ready` only for its own arrays.
    return all(array.is_ready() for array in self.arrays)  # pyright: ignore[reportAttributeAccessIssue]


class HostPool:
  """Holds the rBlocks of one instance's HOST tier and moves them.

  Nothing here waits: `copy` takes a list, `advance` launches what can be
  launched. A program in HBM never waits for the link: rBlocks that leave are
  packed first and then transferred, rBlocks that enter are unpacked once they
  are there.

  Attributes:
    num_moved: rBlocks that arrived so far, by the tier that they came to.
  """

  def __init__(
    self,
    pool: PoolArrays,
    row: Mesh,
    *,
    name: Hashable,
    num_blocks: int,
    run: Run,
    batch_blocks: int = BATCH_BLOCKS,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
  ):
    """Allocates and touches all of its memory; blocks the host.

    Args:
      pool: The instance's pool in HBM.
      row: The instance's devices.
      name: Of the instance, in keys of programs.
      num_blocks: rBlocks with the null block, which takes no memory.
      run: Runs its programs.
      batch_blocks: Most rBlocks of a batch.
      verify: Whether to compare checksums of both ends of each of its moves,
        which blocks the host; for debugging.
      progress: Told how many rBlocks of how many are allocated.
    """
    self._row = row
    self._name = name
    self._run = run
    self._batch_blocks = batch_blocks
    self._verify = verify
    self._hbm = NamedSharding(row, POOL_SPECS.kv)
    self._host = self._hbm.with_memory_kind("pinned_host")
    self._replicated = NamedSharding(row, PartitionSpec())
    self._tag = jax.device_put(
      np.zeros(num_blocks, np.uint32), self._replicated
    )
    self._padding = jax.device_put(
      np.zeros((1, *pool.kv.shape[1:]), pool.kv.dtype), self._hbm
    )
    # The first use of host memory is slow: now rather than while serving.
    self._blocks = {}
    for block_id in range(NULL_BLOCK_ID + 1, num_blocks):
      self._blocks[block_id] = jax.device_put(
        self._padding, self._host, may_alias=False
      )
      if block_id % batch_blocks == 0 or block_id == num_blocks - 1:
        jax.block_until_ready(self._blocks[block_id])
        if progress:
          progress(block_id, num_blocks - 1)
    self._waiting = {tier: collections.deque[_Part]() for tier in Tier}
    self._under_way = {tier: collections.deque[_Batch]() for tier in Tier}
    self.num_moved = collections.Counter[Tier]()

  @property
  def is_idle(self) -> bool:
    """Whether no copy is under way."""
    return not any(self._waiting.values()) and not any(self._under_way.values())

  def read(self, block_id: BlockId) -> tuple[np.ndarray, int]:
    """KV `[L, 2, K, P, D]` and tag of an rBlock; blocks the host."""
    return np.asarray(self._blocks[block_id])[0], int(self._tag[block_id])

  def release(self, block_ids: Iterable[BlockId]) -> None:
    """Gives the memory of rBlocks to something else until they are written."""
    for block_id in block_ids:
      self._blocks.pop(block_id, None)

  def copy(self, to_tier: Tier, moves: Iterable[TierMove]) -> Copy:
    """Has rBlocks copied, in order, as soon as there is room for them.

    The sources stay as they are until it is done, and nobody reads or writes
    the destinations.

    Args:
      to_tier: Where to.
      moves: The rBlocks; none of them in another copy under way.

    Returns:
      Tells when it is done.
    """
    moves = tuple(moves)
    copy = Copy(to_tier, len(moves))
    self._waiting[to_tier].extend(_Part(copy, move) for move in moves)
    return copy

  def advance(self, pool: PoolArrays, *, is_behind: bool = False) -> PoolArrays:
    """Ends what is over and launches a batch each way; never waits.

    No more than that, since preparing a batch takes the host about half as long
    as launching a decode step, and other steps wait meanwhile.

    Donates: `pool`, if rBlocks enter it.

    Args:
      pool: The instance's pool in HBM.
      is_behind: Whether something long is under way: then nothing is launched.

    Returns:
      The newest wrapper of the pool.

    Raises:
      InvariantError: If moves are verified and one changed its content.
      RuntimeError: If JAX could not launch a transfer; its moves wait still.
    """
    leaving, entering = self._under_way[Tier.HOST], self._under_way[Tier.HBM]
    while leaving and leaving[0].is_over():
      self._end_leaving(leaving[0])
    if is_behind:
      return pool
    # What may fail comes before the pool is donated.
    if self._has_room(Tier.HOST):
      self._begin_leaving(pool)
    if self._has_room(Tier.HBM):
      self._begin_entering()
    while entering and entering[0].is_over():
      pool = self._end_entering(entering[0], pool)
    return pool

  def drain(self, pool: PoolArrays) -> PoolArrays:
    """Advances until nothing is under way; blocks the host.

    Donates: `pool`, if rBlocks enter it.
    """
    while not self.is_idle:
      pool = self.advance(pool)
      if any(map(self._has_room, Tier)):
        continue
      for batches in self._under_way.values():
        if batches:
          jax.block_until_ready(batches[0].arrays)
    return pool

  def warm_up(self, pool: PoolArrays) -> PoolArrays:
    """Compiles both programs and runs them with nothing to do.

    Donates: `pool`.
    """
    nothing = self._place(())
    self._leave(pool, nothing)
    return self._enter(pool, nothing, ())[0]

  def _has_room(self, to_tier: Tier) -> bool:
    return (
      len(self._under_way[to_tier]) < BATCHES_UNDER_WAY
      and len(self._waiting[to_tier]) > 0
    )

  def _next_parts(self, to_tier: Tier) -> list[_Part]:
    """The next batch; they wait until `_begun`, in case a launch fails."""
    waiting = self._waiting[to_tier]
    return [waiting[i] for i in range(min(len(waiting), self._batch_blocks))]

  def _begun(self, to_tier: Tier, batch: _Batch) -> None:
    for _ in batch.parts:
      self._waiting[to_tier].popleft()
    self._under_way[to_tier].append(batch)

  def _begin_leaving(self, pool: PoolArrays) -> None:
    parts = self._next_parts(Tier.HOST)
    placed = self._place(parts)
    packed, tag, checks = self._leave(pool, placed)
    arrays = _transfer(packed[: len(parts)], self._host)
    self._tag = tag
    for part, array in zip(parts, arrays, strict=True):
      self._blocks[part.move.dst_block] = array
    batch = _Batch(parts=parts, placed=placed, arrays=arrays, checks=checks)
    self._begun(Tier.HOST, batch)

  def _begin_entering(self) -> None:
    parts = self._next_parts(Tier.HBM)
    blocks = [self._blocks[part.move.src_block] for part in parts]
    arrays = _transfer(blocks, self._hbm)
    placed = self._place(parts)
    self._begun(Tier.HBM, _Batch(parts=parts, placed=placed, arrays=arrays))

  def _end_leaving(self, batch: _Batch) -> None:
    if batch.checks is not None:
      _compare(batch.parts, batch.arrays, batch.checks)
    self._end(Tier.HOST, batch)

  def _end_entering(self, batch: _Batch, pool: PoolArrays) -> PoolArrays:
    pool, checks = self._enter(pool, batch.placed, batch.arrays)
    if checks is not None:
      blocks = [self._blocks[part.move.src_block] for part in batch.parts]
      _compare(batch.parts, blocks, checks)
    self._end(Tier.HBM, batch)
    return pool

  def _end(self, to_tier: Tier, batch: _Batch) -> None:
    self._under_way[to_tier].popleft()
    for part in batch.parts:
      part.copy.end_one()
    self.num_moved[to_tier] += len(batch.parts)

  def _leave(
    self, pool: PoolArrays, placed: PackedRows[TierBatch]
  ) -> tuple[Sequence[jax.Array], jax.Array, Checks | None]:
    return self._run(
      ("leave HBM", self._name),
      lambda: build_leave(self._row, self._batch_blocks, verify=self._verify),
      (pool.kv, pool.tag, self._tag, placed),
    )

  def _enter(
    self,
    pool: PoolArrays,
    placed: PackedRows[TierBatch],
    arrays: Sequence[jax.Array],
  ) -> tuple[PoolArrays, Checks | None]:
    padding = [self._padding] * (self._batch_blocks - len(arrays))
    return self._run(
      ("enter HBM", self._name),
      lambda: build_enter(self._row, self._batch_blocks, verify=self._verify),
      (pool, self._tag, placed, (*arrays, *padding)),
    )

  def _place(self, parts: Sequence[_Part]) -> PackedRows[TierBatch]:
    """Pads a batch and puts it where the instance's devices read it."""
    batch = TierBatch(
      *(np.full(self._batch_blocks, 0, t) for t in ("i4", "u4", "i4", "u4"))
    )
    for q, (_, move) in enumerate(parts):
      batch.src_block[q] = move.src_block
      batch.src_tag[q] = move.src_tag
      batch.dst_block[q] = move.dst_block
      batch.dst_tag[q] = move.dst_tag
    return place_rows([batch], self._row, [self._row])


def _transfer(
  arrays: Sequence[jax.Array], to: NamedSharding
) -> list[jax.Array]:
  """Has arrays copied over the link, which begins with the first."""
  transferred = jax.device_put(list(arrays[:1]), to)
  for few in itertools.batched(arrays[1:], _LAUNCHED_AT_ONCE):
    transferred += jax.device_put(list(few), to)
  return transferred


def _compare(
  parts: Sequence[_Part], host: Sequence[jax.Array], checks: Checks
) -> None:
  """Compares what lies in host memory with what lies in HBM.

  Raises:
    InvariantError: If a move changed its content.
  """
  is_proved, sums = jax.device_get(checks)
  for q, (part, array) in enumerate(zip(parts, host, strict=True)):
    # Nothing was promised of a source that held something else.
    if not is_proved[q]:
      continue
    for rank, shard in enumerate(array.addressable_shards):
      there = int(checksum(np.asarray(shard.data)))
      if there != sums[rank, q]:
        raise InvariantError(
          f"A move to {part.copy.to_tier.name} changed an rBlock:"
          f" {part.move} has checksum {there:#x} in host memory and"
          f" {int(sums[rank, q]):#x} in HBM on tensor rank {rank}."
        )
