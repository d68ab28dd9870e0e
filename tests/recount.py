"""Counts rBlocks anew, from who holds them instead of from a pool's counters.

A pool's counters go up and down by one together, so their sum says nothing.
Here each rBlock must be found exactly once in books that others keep: tables of
requests, moves and copies under way, leases, and the list of free ones.
"""

import collections
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import BlockState, Location
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.types import (
  BlockId,
  Epoch,
  InstanceId,
  PoolCounts,
  RequestUid,
  Tier,
)

if TYPE_CHECKING:
  from infinite_llm.engine.engine import Engine


class _Holder(NamedTuple):
  """Who has an rBlock, by books other than its pool's."""

  owner: InstanceId
  uid: RequestUid
  epoch: Epoch


def check_engine_books(engine: "Engine") -> None:
  """Recounts all instances of an engine.

  Raises:
    AssertionError: As `check_books`, or if a pool has another size than it was
      made with.
  """
  for manager, batcher in zip(
    engine.group.managers, engine.batchers, strict=True
  ):
    check_books(manager, [request.uid for request in batcher.running])
    assert manager.counts().total == engine.config.cache.num_blocks - 1


def check_books(manager: RManager, running: Collection[RequestUid]) -> None:
  """Recounts an instance: `used + free + hosted + reserved == total`.

  Args:
    manager: Keeps the tables, leases and pools.
    running: Requests that have rBlocks in HBM, or are to get some.

  Raises:
    AssertionError: If an rBlock has no holder or several, its metadata names
      another one, or the counts are not those of the holders.
  """
  debtor, swapping = manager._debtor, manager.swapping
  assert set(running) == set(debtor._accounts), (running, debtor._accounts)
  leases = manager._creditor._leases
  copies = {*swapping._swapped.values(), *swapping._under_way.values()}
  own: dict[RequestUid, set[Location]] = collections.defaultdict(set)
  for uid in running:
    account = debtor.account(uid)
    own[uid].update(
      location for _, location in account.table.hosted_entries(manager.instance)
    )
    # Of two copies of an rBlock, the one that the table does not name.
    if account.borrow is not None:
      own[uid].update(pending.old for pending in account.borrow.moves)
    if account.recall is not None:
      own[uid].update(pending.new for pending in account.recall.moves)
  for copy in copies:  # What is copied out has left its table already.
    own[copy.uid].update(copy.home)
  slabs = manager.overflow._leaving
  for effect, slab in slabs.items():  # Here only if nobody wants it any more.
    own[effect.uid].update(slab.home)
  hosted = {
    block_id: _Holder(lease.owner.instance, lease.uid, lease.epoch)
    for block_id, lease in leases.items()
  }
  _check_pool(manager.pool, own, hosted)
  assert manager.pool.num_lent == len(leases)
  assert sum(manager.lent().values()) == len(leases), (manager.lent(), leases)
  for block_id, lease in leases.items():
    is_hosted = manager.pool.block(block_id).state is BlockState.HOSTED
    assert is_hosted == lease.is_hosted, (block_id, lease)
  if swapping._host is not None:
    in_host: dict[RequestUid, set[Location]] = collections.defaultdict(set)
    for copy in copies:
      in_host[copy.uid].update(copy.host)
    for uid in running:
      table = debtor.account(uid).table
      places = map(table.location, range(table.num_blocks))
      overflown = [place for place in places if place.tier is Tier.HOST]
      assert len(overflown) == table.num_host
      in_host[uid].update(overflown)
    for effect, slab in slabs.items():
      in_host[effect.uid].update(slab.host)
    _check_pool(swapping.host_pool, in_host, {})


def _check_pool(
  pool: BlockPool,
  own: dict[RequestUid, set[Location]],
  hosted: dict[BlockId, _Holder],
) -> None:
  """Compares a pool with those who hold its rBlocks."""
  holders: dict[BlockId, list[_Holder | None]] = collections.defaultdict(list)
  for uid, locations in own.items():
    for location in locations:
      holder = _Holder(pool.instance, uid, location.epoch)
      holders[location.block_id].append(holder)
  for block_id, holder in hosted.items():
    holders[block_id].append(holder)
  for block_id in pool.free_ids:
    holders[block_id].append(None)
  total = pool.counts().total
  wrong = {
    block_id: holders.get(block_id, [])
    for block_id in {*range(1, total + 1), *holders}
    if len(holders.get(block_id, ())) != 1 or not 1 <= block_id <= total
  }
  assert not wrong, (
    f"rBlocks of instance {pool.instance} must be free, or held by one request;"
    f" got {wrong}"
  )
  states: collections.Counter[BlockState] = collections.Counter()
  for block_id, (holder,) in holders.items():
    block = pool.block(block_id)
    states[block.state] += 1
    if holder is None:
      assert block.state is BlockState.FREE, block
    else:
      assert (block.owner, block.uid, block.epoch) == holder, (block, holder)
      assert block.state in _states_of(holder, pool), (block, holder)
  assert pool.is_conserved
  assert pool.counts() == _counts(states, total), (
    f"Instance {pool.instance} counts {pool.counts()}, but its rBlocks are"
    f" {states}"
  )


def _states_of(holder: _Holder, pool: BlockPool) -> Iterable[BlockState]:
  if holder.owner == pool.instance:
    return (BlockState.RESERVED, BlockState.LIVE, BlockState.MOVING)
  return (BlockState.RESERVED, BlockState.HOSTED)


def _counts(states: collections.Counter[BlockState], total: int) -> PoolCounts:
  return PoolCounts(
    used=states[BlockState.LIVE] + states[BlockState.MOVING],
    free=states[BlockState.FREE],
    hosted=states[BlockState.HOSTED],
    reserved=states[BlockState.RESERVED],
    total=total,
  )
