"""rBlocks of running requests in one instance's host memory, as slabs.

A slab takes the place of as many rBlocks of the HOST pool, and is attended
where it is: layer by layer, on its way through HBM (`cache/host_slabs.py`). Its
tags come with it, written by the program that packed it.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from infinite_llm.cache.checksum import checksum
from infinite_llm.cache.host_pool import Run, TierMove
from infinite_llm.cache.host_slabs import TABLE_SPECS, SlabStream, in_order
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.tier_moves import (
  TierBatch,
  build_leave_as_slab,
  build_slab_sum,
)
from infinite_llm.errors import InvariantError
from infinite_llm.types import NULL_BLOCK_ID, RequestUid, Tier
from pallas_kernels.micro_attention.api import BlockTables

MOST_STAGED = 6
"""Parts of slabs in HBM at once, or as many times as are attended together. The
host learns late that some are attended, and the link must have work until then.
"""

type Staged = tuple[jax.Array, jax.Array, BlockTables]
"""A part of a slab in HBM, with the tag and the tables of the slab."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SlabSums:
  """What a slab was in HBM, where moves are verified.

  Attributes:
    uid: Its request.
    first: Number of its first rBlock in the request.
    sums: `[tensor, L]` uint32 checksums of each rank's part of each layer.
  """

  uid: RequestUid
  first: int
  sums: jax.Array

  def compare(self, layer: int, found: Sequence[int], tier: Tier) -> None:
    """Compares what arrived of a layer; blocks the host.

    Args:
      layer: Which one.
      found: Checksum of what arrived of each rank's part.
      tier: Where.

    Raises:
      InvariantError: If it changed.
    """
    left = np.asarray(self.sums)[:, layer]
    for rank, (sent, there) in enumerate(zip(left, found, strict=True)):
      if sent != there:
        raise InvariantError(
          f"Layer {layer} of the slab of request {self.uid} from rBlock"
          f" {self.first} on must arrive as it left; it changed on its way to"
          f" {tier.name}: it left HBM with checksum {int(sent):#x} and has"
          f" {int(there):#x} on tensor rank {rank}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeldSlab:
  """S full rBlocks of one request, behind a null block.

  Attributes:
    layers: For each layer `[1 + S, 1, 2, K, P, D]` in host memory.
    tag: `[1 + S]` uint32 what the rBlocks hold, on the devices.
    tables: One row over them, on the devices.
    sums: What is to arrive in HOST, and again in HBM; None if nobody compares.
  """

  layers: tuple[jax.Array, ...]
  tag: jax.Array
  tables: BlockTables
  sums: SlabSums | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class LeavingSlab:
  """A slab on its way to host memory.

  Attributes:
    uid: Its request.
    slab: It, as it will be.
    is_dropped: Nobody wants it any more.
  """

  uid: RequestUid
  slab: HeldSlab
  is_dropped: bool = False

  @property
  def is_done(self) -> bool:
    """Whether all of it is there."""
    # JAX declares `is_ready` only for its own arrays.
    return all(layer.is_ready() for layer in self.slab.layers)  # pyright: ignore[reportAttributeAccessIssue]


class SlabStore:
  """Holds the slabs of one instance."""

  def __init__(
    self,
    row: Mesh,
    *,
    name: Hashable,
    slab_blocks: int,
    run: Run,
    verify: bool = False,
  ):
    """Makes it empty; allocates nothing.

    Args:
      row: The instance's devices.
      name: Of the instance, in keys of programs.
      slab_blocks: S, rBlocks of every slab.
      run: Runs its programs.
      verify: Whether to compare checksums of what arrived in HOST, and of what
        came back from there each time that it is attended, with those of what
        left. It blocks the host; for debugging.
    """
    self._row = row
    self._name = name
    self._slab_blocks = slab_blocks
    self._run = run
    self._verify = verify
    self._hbm = NamedSharding(row, POOL_SPECS.kv)
    self._host = self._hbm.with_memory_kind("pinned_host")
    self._nothing: Staged | None = None
    self._slabs = collections.defaultdict[RequestUid, list[HeldSlab]](list)
    self._leaving: list[LeavingSlab] = []

  def slabs(self, uid: RequestUid) -> Sequence[HeldSlab]:
    """What is held of a request, oldest first."""
    return tuple(self._slabs.get(uid, ()))

  def leave(
    self,
    pool: PoolArrays,
    uid: RequestUid,
    moves: Sequence[TierMove],
    logical_ids: Sequence[int],
  ) -> LeavingSlab:
    """Begins to copy rBlocks out of a pool; never waits.

    Args:
      pool: The instance's pool in HBM.
      uid: Their request.
      moves: The rBlocks, S of them.
      logical_ids: Number of each in the request, rising.

    Returns:
      To be given to `keep` once it is done.
    """
    if len(moves) != self._slab_blocks:
      raise InvariantError(
        f"A slab takes {self._slab_blocks} rBlocks; got {len(moves)}."
      )
    slab = self._begin(pool, uid, moves, logical_ids)
    leaving = LeavingSlab(uid=uid, slab=slab)
    self._leaving.append(leaving)
    return leaving

  def keep(self, leaving: LeavingSlab) -> None:
    """Holds a slab that is there, behind those of its request.

    Raises:
      InvariantError: If copies are verified and this one changed its content.
    """
    self._leaving.remove(leaving)
    slab = leaving.slab
    if slab.sums is not None:
      for layer, there in enumerate(slab.layers):
        ranks = (np.asarray(shard.data) for shard in there.addressable_shards)
        found = [int(checksum(rank)) for rank in ranks]
        slab.sums.compare(layer, found, Tier.HOST)
    if not leaving.is_dropped:
      self._slabs[leaving.uid].append(slab)

  def drop(self, uid: RequestUid) -> None:
    """Forgets the slabs of a request, also those on their way."""
    self._slabs.pop(uid, None)
    for leaving in self._leaving:
      leaving.is_dropped |= leaving.uid == uid

  def stream(self, slabs: Sequence[HeldSlab], together: int) -> SlabStream:
    """Begins to bring slabs through HBM, layer by layer.

    Args:
      slabs: Those to be attended.
      together: Whose parts of a layer are attended at a time.

    Returns:
      Gives their parts; raises `InvariantError` before one that changed, if
      moves are verified.
    """
    parts = in_order([slab.layers for slab in slabs], together)
    check = self._check_of(slabs, together) if self._verify else None
    return SlabStream(parts, self._hbm, MOST_STAGED, check)

  def staged(
    self,
    slabs: Sequence[HeldSlab],
    parts: Sequence[jax.Array],
    together: int,
  ) -> tuple[Staged, ...]:
    """Parts that came together, with what names them.

    Args:
      slabs: Whose they are.
      parts: A layer of each.
      together: How many a program takes.

    Returns:
      As many; those that are missing hold nothing.
    """
    found = [
      (part, slab.tag, slab.tables)
      for part, slab in zip(parts, slabs, strict=True)
    ]
    while len(found) < together:
      found.append(self._no_part(parts[0]))
    return tuple(found)

  def _no_part(self, like: jax.Array) -> Staged:
    """Stands for a slab where there are too few; placed once."""
    if self._nothing is None:
      tags = NamedSharding(self._row, POOL_SPECS.tag)
      self._nothing = (
        jax.device_put(np.zeros(like.shape, like.dtype), self._hbm),
        jax.device_put(np.zeros(1 + self._slab_blocks, np.uint32), tags),
        self._tables(()),
      )
    return self._nothing

  def warm_up(self, pool: PoolArrays) -> HeldSlab:
    """Compiles the program that packs, and runs it over null blocks.

    Returns:
      A slab that holds nothing; to stream it compiles what verifies.
    """
    return self._begin(pool, 0, (), ())

  def _begin(
    self,
    pool: PoolArrays,
    uid: RequestUid,
    moves: Sequence[TierMove],
    logical_ids: Sequence[int],
  ) -> HeldSlab:
    """Packs rBlocks, as many as there are, and begins their transfer."""
    layers, tag, sums = self._pack(pool, moves)
    if sums is not None:
      first = logical_ids[0] if logical_ids else 0
      sums = SlabSums(uid=uid, first=first, sums=sums)
    return HeldSlab(
      layers=tuple(jax.device_put(list(layers), self._host)),
      tag=tag,
      tables=self._tables(logical_ids),
      sums=sums,
    )

  def _check_of(
    self, slabs: Sequence[HeldSlab], together: int
  ) -> Callable[[tuple[jax.Array, ...]], None]:
    """What compares the parts of a stream, in their order."""
    num_layers = len(slabs[0].layers) if slabs else 0
    order = itertools.product(
      range(num_layers), itertools.batched(slabs, together)
    )

    def check(parts: tuple[jax.Array, ...]) -> None:
      layer, those = next(order)
      for slab, part in zip(those, parts, strict=True):
        if slab.sums is not None:
          found = self._run(
            ("sum of a slab's part", self._name),
            lambda: build_slab_sum(self._row),
            (part,),
          )
          slab.sums.compare(layer, np.asarray(found).tolist(), Tier.HBM)

    return check

  def _pack(
    self, pool: PoolArrays, moves: Sequence[TierMove]
  ) -> tuple[Sequence[jax.Array], jax.Array, jax.Array | None]:
    batch = TierBatch(
      *(np.zeros(self._slab_blocks, t) for t in ("i4", "u4", "i4", "u4"))
    )
    for q, move in enumerate(moves):
      batch.src_block[q] = move.src_block
      batch.src_tag[q] = move.src_tag
      batch.dst_tag[q] = move.dst_tag
    return self._run(
      ("leave HBM as a slab", self._name),
      lambda: build_leave_as_slab(self._row, verify=self._verify),
      (pool.kv, pool.tag, place_rows([batch], self._row, [self._row])),
    )

  def _tables(self, logical_ids: Sequence[int]) -> BlockTables:
    numbers = np.zeros(1 + self._slab_blocks, np.int32)
    numbers[1 : 1 + len(logical_ids)] = logical_ids
    tables = BlockTables(
      block_ids=np.arange(NULL_BLOCK_ID, len(numbers), dtype=np.int32),
      logical_ids=numbers,
      starts=np.ones(1, np.int32),
      counts=np.asarray([len(logical_ids)], np.int32),
    )
    return jax.device_put(
      tables,
      jax.tree.map(lambda spec: NamedSharding(self._row, spec), TABLE_SPECS),
    )
