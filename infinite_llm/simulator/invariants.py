"""Full checks of a simulated cluster: all books, all tables, all devices."""

from collections.abc import Sequence

from infinite_llm.cache.rblock import BlockState
from infinite_llm.scheduler.swapping import Stage
from infinite_llm.simulator.data_plane import DataPlane
from infinite_llm.simulator.instance import Instance
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import (
  NO_EPOCH,
  BlockId,
  InstanceId,
  RequestUid,
  Tier,
)


def check_ownership(instances: Sequence[Instance], plane: DataPlane) -> None:
  """What must hold at any moment, over all instances that are up.

  Raises:
    ViolationError: If an rBlock is named by two tables, or by one whose it is
      not, or is counted or received under another name than its lease's.
  """
  named: dict[tuple[InstanceId, BlockId], RequestUid] = {}
  for instance in instances:
    if instance.is_up:
      _check_tables(instance, named)
      _check_pool(instance, plane)
      _check_host(instance, plane)


def check_agreement(instances: Sequence[Instance]) -> None:
  """What must hold once all messages have arrived.

  Raises:
    ViolationError: If two instances disagree on what one lent to the other.
  """
  for lender in instances:
    for debtor in instances:
      lent = lender.manager.lent().get(debtor.number, 0)
      borrowed = debtor.manager.borrowed().get(lender.number, 0)
      if lent != borrowed:
        raise ViolationError(
          f"Instance {lender.number} says that it lent {lent} rBlocks to"
          f" instance {debtor.number}, which says that it borrowed {borrowed}."
        )


def check_empty(instances: Sequence[Instance], plane: DataPlane) -> None:
  """What must hold once no request is left.

  Raises:
    ViolationError: If anything is still held by anybody.
  """
  for instance in instances:
    manager = instance.manager
    counts = manager.counts()
    host = manager.swapping.counts()
    slots = manager.num_free_slots
    epochs = plane.devices[instance.number].epoch
    hosted = [v for v in manager.hosted.versions() if len(v.entries)]
    if (
      counts.free != counts.total
      or host.free != host.total
      or manager.lent()
      or manager.borrowed()
      or any(epoch != NO_EPOCH for epoch in epochs)
      or hosted
    ):
      raise ViolationError(
        f"Instance {instance.number} is not empty: {counts}, HOST {host}, lent"
        f" {manager.lent()}, borrowed {manager.borrowed()}, epochs {epochs},"
        f" hosted {hosted}."
      )
    if slots != instance.num_spill_slots:
      raise ViolationError(
        f"Instance {instance.number} has {slots} free spill slots, not"
        f" {instance.num_spill_slots}."
      )
    if sum(manager.refused.values()) != instance.num_nonsense:
      raise ViolationError(
        f"Instance {instance.number} refused messages of sane senders:"
        f" {dict(manager.refused)}, of which {instance.num_nonsense} were not."
      )


def _check_tables(
  instance: Instance, named: dict[tuple[InstanceId, BlockId], RequestUid]
) -> None:
  manager = instance.manager
  for request in instance.batcher.running:
    table = manager.table(request.uid)
    for logical_id in range(table.num_blocks):
      location = table.location(logical_id)
      place, pool = (location.instance, location.block_id), manager.pool
      if location.tier is Tier.HOST:
        place = ~location.instance, location.block_id
        pool = manager.swapping.host_pool
      # A creditor that crashed, or that ended the lease, may have given the
      # rBlock to another; its tables say so, and the proof fails.
      if location.instance == instance.number:
        if place in named:
          raise ViolationError(
            f"Requests {named[place]} and {request.uid} both name rBlock"
            f" {place[1]} of instance {place[0]}."
          )
        named[place] = request.uid
        block = pool.block(location.block_id)
        held = block.owner, block.uid, block.epoch
        if held != (instance.number, request.uid, location.epoch):
          raise ViolationError(
            f"Request {request.uid} of instance {instance.number} names"
            f" {location} as its own, which is {block}."
          )


def _check_pool(instance: Instance, plane: DataPlane) -> None:
  pool = instance.manager.pool
  counts = pool.counts()
  leases = instance.watch.history.leases
  epochs = plane.devices[instance.number].epoch
  num_free = 0
  for block_id in range(1, counts.total + 1):
    block = pool.block(block_id)
    num_free += block.state is BlockState.FREE
    lease = leases.get(block_id)
    is_lent = block.owner not in (None, instance.number)
    if (lease is not None) != is_lent:
      raise ViolationError(
        f"Instance {instance.number} has {block}, but the lease is {lease}."
      )
    if lease is not None:
      held = block.owner, block.uid, block.epoch, epochs[block_id]
      if held != (lease.owner, lease.uid, lease.epoch, lease.epoch) or (
        lease.is_hosted != (block.state is BlockState.HOSTED)
      ):
        raise ViolationError(
          f"Instance {instance.number} keeps {block}, received under epoch"
          f" {epochs[block_id]}, but the lease is {lease}."
        )
    elif epochs[block_id] not in (NO_EPOCH, block.epoch):
      raise ViolationError(
        f"Instance {instance.number} receives under epoch {epochs[block_id]}"
        f" into {block}."
      )
  if num_free != counts.free:
    raise ViolationError(
      f"Instance {instance.number} counts {counts}, but {num_free} are free."
    )


def _check_host(instance: Instance, plane: DataPlane) -> None:
  """What lies in HOST is that of requests that wait there, or of copies."""
  swapping = instance.manager.swapping
  counts = instance.manager.counts(Tier.HOST)
  num_free = 0
  for block_id in range(1, counts.total + 1):
    block = swapping.host_pool.block(block_id)
    if block.uid is None:
      num_free += 1
      continue
    is_known = (
      swapping.stage(block.uid)
      or block.uid in instance.copied
      or block.uid == instance.manager.overflow.uid
    )
    if block.owner != instance.number or not is_known:
      raise ViolationError(
        f"Instance {instance.number} keeps {block} in HOST for nobody."
      )
    content = plane.hosts[instance.number].content[block_id]
    tag = plane.hosts[instance.number].tag[block_id]
    if (
      tag
      and swapping.stage(block.uid) is Stage.WAITING
      and (content is None or content[0] != block.uid)
    ):
      raise ViolationError(
        f"Instance {instance.number} keeps {content} in HOST as {block}."
      )
  if num_free != counts.free:
    raise ViolationError(
      f"Instance {instance.number} counts {counts} in HOST, but {num_free} are"
      " free."
    )
