"""rBlocks of running requests in one instance's host memory, as slabs.

A slab takes the place of as many rBlocks of the HOST pool, and is attended
where it is: layer by layer, on its way through HBM (`cache/host_slabs.py`). Its
tags come with it, written by the program that packed it.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from infinite_llm.cache.host_pool import Run, TierMove
from infinite_llm.cache.host_slabs import TABLE_SPECS, SlabStream, in_order
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.tier_moves import TierBatch, build_leave_as_slab
from infinite_llm.errors import InvariantError
from infinite_llm.types import NULL_BLOCK_ID, RequestUid
from pallas_kernels.micro_attention.api import BlockTables

MOST_STAGED = 6
"""Parts of slabs in HBM at once, or as many times as are attended together. The
host learns late that some are attended, and the link must have work until then.
"""

type Staged = tuple[jax.Array, jax.Array, BlockTables]
"""A part of a slab in HBM, with the tag and the tables of the slab."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeldSlab:
  """S full rBlocks of one request, behind a null block.

  Attributes:
    layers: For each layer `[1 + S, 1, 2, K, P, D]` in host memory.
    tag: `[1 + S]` uint32 what the rBlocks hold, on the devices.
    tables: One row over them, on the devices.
  """

  layers: tuple[jax.Array, ...]
  tag: jax.Array
  tables: BlockTables


@dataclasses.dataclass(kw_only=True, eq=False)
class LeavingSlab:
  """A slab on its way to host memory.

  Attributes:
    uid: Its request.
    slab: It, as it will be.
    packed: Its layers in HBM; kept only if the copy is to be verified.
    is_dropped: Nobody wants it any more.
  """

  uid: RequestUid
  slab: HeldSlab
  packed: tuple[jax.Array, ...]
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
      run: Runs its program.
      verify: Whether to compare what arrived with what left, which blocks the
        host; for debugging.
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
    layers, tag = self._pack(pool, moves)
    slab = HeldSlab(
      layers=tuple(jax.device_put(list(layers), self._host)),
      tag=tag,
      tables=self._tables(logical_ids),
    )
    packed = layers if self._verify else ()
    leaving = LeavingSlab(uid=uid, slab=slab, packed=packed)
    self._leaving.append(leaving)
    return leaving

  def keep(self, leaving: LeavingSlab) -> None:
    """Holds a slab that is there, behind those of its request.

    Raises:
      InvariantError: If copies are verified and this one changed its content.
    """
    self._leaving.remove(leaving)
    for layer, (sent, got) in enumerate(
      zip(leaving.packed, leaving.slab.layers, strict=bool(leaving.packed))
    ):
      if np.asarray(sent).tobytes() != np.asarray(got).tobytes():
        raise InvariantError(
          f"Layer {layer} of a slab of request {leaving.uid} must arrive as it"
          " left; it changed on its way to HOST."
        )
    if not leaving.is_dropped:
      self._slabs[leaving.uid].append(leaving.slab)

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
    """
    parts = in_order([slab.layers for slab in slabs], together)
    return SlabStream(parts, self._hbm, MOST_STAGED)

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
    """Compiles the program, and runs it over null blocks.

    Returns:
      A slab that holds nothing.
    """
    layers, tag = self._pack(pool, ())
    return HeldSlab(
      layers=tuple(jax.device_put(list(layers), self._host)),
      tag=tag,
      tables=self._tables(()),
    )

  def _pack(
    self, pool: PoolArrays, moves: Sequence[TierMove]
  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    batch = TierBatch(
      *(np.zeros(self._slab_blocks, t) for t in ("i4", "u4", "i4", "u4"))
    )
    for q, move in enumerate(moves):
      batch.src_block[q] = move.src_block
      batch.src_tag[q] = move.src_tag
      batch.dst_tag[q] = move.dst_tag
    return self._run(
      ("leave HBM as a slab", self._name),
      lambda: build_leave_as_slab(self._row),
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
