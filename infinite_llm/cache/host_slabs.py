"""rBlocks in host memory that attention reads: streamed, layer by layer.

Other than in the HOST pool (`cache/host_pool.py`), where whole rBlocks wait, a
*slab* keeps some tens of rBlocks with each layer as an array of its own: what
one layer needs of them comes in one transfer, while the layer before it is
computed. Transfers run beside all programs, and those that were measured reach
the link's speed; slices of host memory inside a program did not.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.cache.global_arrays import place, transfer
from infinite_llm.cache.kv_pool import POOL_SPECS
from infinite_llm.cache.tier_moves import pack_by_layer
from infinite_llm.errors import InvariantError
from infinite_llm.types import INSTANCE_AXIS, NULL_BLOCK_ID
from pallas_kernels.micro_attention.api import BlockTables

_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slab:
  """Some rBlocks of one request on each instance.

  Attributes:
    layers: For each layer `[I * (1 + S), 1, 2, K, P, D]` in host memory, behind
      a null block on each instance.
    tables: One row for each instance over its part, on the devices: `[I *
      (1 + S)]` entries, `[I]` rows.
  """

  layers: tuple[jax.Array, ...]
  tables: BlockTables


TABLE_SPECS = BlockTables(*[_PER_INSTANCE] * len(BlockTables._fields))


class HostSlabs:
  """Keeps the slabs of one request on all instances of a mesh.

  The mesh may span several processes; all of them then call the same, and each
  has the host memory of its own instances.
  """

  def __init__(self, mesh: Mesh, slab_blocks: int):
    """Makes it empty.

    Args:
      mesh: ("instance", "tensor") mesh of the pools.
      slab_blocks: S, rBlocks of a slab on each instance.
    """
    self._mesh = mesh
    self._slab_blocks = slab_blocks
    self._hbm = NamedSharding(mesh, POOL_SPECS.kv)
    self._host = self._hbm.with_memory_kind("pinned_host")
    self._slabs: list[Slab] = []

  def __len__(self) -> int:
    return len(self._slabs)

  @property
  def slabs(self) -> tuple[Slab, ...]:
    """All slabs, in the order in which they are streamed."""
    return tuple(self._slabs)

  def push(
    self,
    kv: jax.Array,
    block_ids: Sequence[Sequence[int]],
    logical_ids: Sequence[Sequence[int]],
  ) -> None:
    """Copies full rBlocks of a request out of the pools; blocks the host.

    Args:
      kv: `[I * N, L, 2, K, P, D]` pools of all instances.
      block_ids: rBlocks of each instance, at most S.
      logical_ids: Their numbers in the request.
    """
    ids = place(
      self._pad(block_ids, NULL_BLOCK_ID).reshape(-1),
      NamedSharding(self._mesh, _PER_INSTANCE),
    )
    self.add(_by_layer(self._mesh)(kv, ids), logical_ids)

  def add(
    self, layers: Sequence[jax.Array], logical_ids: Sequence[Sequence[int]]
  ) -> None:
    """Takes the KV of a slab layer by layer; blocks the host.

    Args:
      layers: For each layer `[I * (1 + S), 1, 2, K, P, D]` in HBM, behind a
        null block on each instance.
      logical_ids: Numbers in the request, at most S for each instance.
    """
    host = transfer(list(layers), self._host, may_alias=False)
    size = 1 + self._slab_blocks
    tables = BlockTables(
      block_ids=np.tile(np.arange(size, dtype=np.int32), len(logical_ids)),
      logical_ids=self._pad(logical_ids, 0).reshape(-1),
      starts=np.ones(len(logical_ids), np.int32),
      counts=np.asarray([len(ids) for ids in logical_ids], np.int32),
    )
    sharding = NamedSharding(self._mesh, _PER_INSTANCE)
    self._slabs.append(
      Slab(
        layers=tuple(jax.block_until_ready(host)),
        tables=place(tables, sharding),
      )
    )

  def stream(self, most_staged: int = 2) -> "SlabStream":
    """Begins to bring all slabs of layer 0, then of layer 1, and so on.

    Args:
      most_staged: Slabs' layers that are in HBM at once, at least 2.
    """
    parts = in_order([slab.layers for slab in self._slabs], together=1)
    return SlabStream(parts, self._hbm, most_staged)

  def _pad(self, ids: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """`[I, 1 + S]` int32: a null block, then these, then padding."""
    padded = np.full((len(ids), 1 + self._slab_blocks), value, np.int32)
    for row, mine in zip(padded, ids, strict=True):
      if len(mine) > self._slab_blocks:
        raise InvariantError(
          f"A slab takes {self._slab_blocks} rBlocks of an instance; got"
          f" {len(mine)}."
        )
      row[1 : 1 + len(mine)] = mine
    return padded


def in_order(
  slabs: Sequence[Sequence[jax.Array]], together: int
) -> Iterator[tuple[jax.Array, ...]]:
  """All slabs' parts of layer 0, then of layer 1, and so on.

  Args:
    slabs: The layers of each.
    together: Parts to give at a time; the last of a layer may be fewer.
  """
  for parts in zip(*slabs, strict=True):
    yield from itertools.batched(parts, together)


class SlabStream:
  """Brings parts of slabs into HBM, some ahead of what uses them.

  A transfer allocates what it fills, and so waits for all programs that were
  launched before it. A program that waited for its part would hold up every
  transfer begun behind it: the link would idle. So a part is handed out when it
  is there, and those to come are begun before whatever uses it is launched.
  """

  def __init__(
    self,
    parts: Iterator[tuple[jax.Array, ...]],
    hbm: NamedSharding,
    most_staged: int,
    check: Callable[[tuple[jax.Array, ...]], None] | None = None,
  ):
    """Starts the first transfers.

    Args:
      parts: Those used together, in the order of use, in host memory.
      hbm: How they lie on the devices.
      most_staged: How many such tuples are in HBM at once, at least 2.
      check: Called with each tuple that is there, in order, before it is handed
        out; raises if it is not what it should be.
    """
    if most_staged < 2:
      raise InvariantError(
        f"most_staged must be at least 2, or nothing comes while another part"
        f" is used; got {most_staged}."
      )
    self._parts = parts
    self._hbm = hbm
    self._most_staged = most_staged
    self._check = check
    self._staged: collections.deque[tuple[jax.Array, ...]] = collections.deque()
    self._used: collections.deque[Any] = collections.deque()
    self._top_up()

  @property
  def num_staged(self) -> int:
    """How many tuples of parts take room in HBM, as far as is known."""
    return len(self._staged) + len(self._used)

  def take(self) -> tuple[jax.Array, ...]:
    """The next parts; blocks the host until they are there.

    Their user says `used` before it takes others, and keeps no reference.

    Raises:
      InvariantError: If there is none, or it is not what it should be.
    """
    while not self._staged:
      if not self._used:
        raise InvariantError("All parts of the slabs have been taken.")
      jax.block_until_ready(self._used.popleft())
      self._top_up()
    jax.block_until_ready(self._staged[0])
    self._top_up()
    parts = self._staged.popleft()
    if self._check is not None:
      self._check(parts)
    return parts

  def used(self, result: Any) -> None:
    """Notes what is computed from the parts taken last.

    Args:
      result: Once it is computed they are needed no more.
    """
    self._used.append(result)

  def _top_up(self) -> None:
    while self._used and all(
      leaf.is_ready() for leaf in jax.tree.leaves(self._used[0])
    ):
      self._used.popleft()
    while self.num_staged < self._most_staged:
      parts = next(self._parts, None)
      if parts is None:
        return
      self._staged.append(transfer(parts, self._hbm))


@functools.cache
def _by_layer(mesh: Mesh):
  """Program that packs rBlocks and takes them apart by layer."""
  return jax.jit(
    jax.shard_map(
      pack_by_layer,
      mesh=mesh,
      in_specs=(POOL_SPECS.kv, _PER_INSTANCE),
      out_specs=POOL_SPECS.kv,
      check_vma=False,
    )
  )
