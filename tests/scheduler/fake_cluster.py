"""A lending group without devices: real managers, and pools made of tags.

What the devices of `cache/movement.py` and `attention/dist_attention.py` do
with tags and epochs is done here with Python integers, so that a test sees the
same refusals and the same coverage as a real group.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.content_tag import add_coverage, mix_tag
from infinite_llm.config import LendingConfig
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.distributed.transport.in_process import (
  InProcessTransport,
  Interceptor,
)
from infinite_llm.scheduler.effects import (
  GrantEpochs,
  Move,
  MoveBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.fault_points import no_fault
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import (
  Renew,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Envelope,
)
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.rmanager import RManager, SpillInfo
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.types import NO_EPOCH, FaultPoint, InstanceId, Tier
from tests.recount import check_books

BLOCK_SIZE = 8
EPOCHS_PER_INCARNATION = 1000

SWAP_COSTS = SwapCosts(
  block_bytes=1024, link_bytes_per_s=1e6, recompute_tokens_per_s=1e3
)
"""An rBlock is copied out and back in 2 ms; its tokens take 8 ms."""


def until(done: Callable[[], bool], most: int = 200) -> Iterator[None]:
  """Goes round a loop until `done()`; fails instead of going on for ever."""
  for _ in range(most):
    if done():
      return
    yield
  raise AssertionError(f"Not done after {most} rounds.")


@dataclasses.dataclass
class FakeDevice:
  """What one instance's pools hold: a tag for each rBlock, in HBM an epoch."""

  tag: list[int]
  epoch: list[int]
  host_tag: list[int]

  def tags(self, tier: Tier) -> list[int]:
    return self.tag if tier is Tier.HBM else self.host_tag


class FakeCluster:
  """rManagers, gManager, transport and fake devices."""

  def __init__(
    self,
    num_instances: int,
    num_blocks: int,
    *,
    interceptor: Interceptor | None = None,
    transport: Transport | None = None,
    has_standby: bool = False,
    planning: PlanningConfig | None = None,
    faults: FaultPoint = no_fault,
    host_blocks: int = 0,
    **lending,
  ):
    self.now_s = 0.0
    self.faults = faults
    self.lending = LendingConfig(**lending)
    self.num_blocks = num_blocks
    self.host_blocks = host_blocks
    self.incarnations = [1] * num_instances
    self.addresses = (GMANAGER, STANDBY) if has_standby else (GMANAGER,)
    self.managers = [
      self._manager(instance, num_instances)
      for instance in range(num_instances)
    ]
    self.devices = [self._device() for _ in range(num_instances)]
    # Those that live, by address; messages to others are lost.
    self.gmanagers = {
      address: GManager(
        self.lending,
        lambda: self.now_s,
        planning=planning,
        address=address,
        peers=[other for other in self.addresses if other != address],
        is_leader=address == GMANAGER,
        num_instances=num_instances,
        faults=faults,
      )
      for address in self.addresses
    }
    self.transport = transport or InProcessTransport(interceptor)
    for instance, manager in enumerate(self.managers):
      self.transport.register(instance, manager.on_message)
    for address in self.addresses:
      self.transport.register(address, self._to_gmanager)
    self.moves: collections.deque[Move] = collections.deque()
    self.swaps: collections.deque[tuple[InstanceId, SwapBlocks]] = (
      collections.deque()
    )
    self.is_copying = True  # Between tiers; if not, `swaps` wait.
    self.refused_payloads = 0
    self.proved: dict[int, int] = {}

  def _manager(self, instance: int, num_instances: int) -> RManager:
    incarnation = self.incarnations[instance]
    last_epoch = (incarnation - 1) * EPOCHS_PER_INCARNATION
    host = None
    if self.host_blocks:
      host = HostTier(
        pool=BlockPool(instance, self.host_blocks, last_epoch, Tier.HOST),
        costs=SWAP_COSTS,
      )
    return RManager(
      instance=instance,
      num_instances=num_instances,
      pool=BlockPool(instance, self.num_blocks, last_epoch),
      block_size=BLOCK_SIZE,
      lending=self.lending,
      clock=lambda: self.now_s,
      incarnation=incarnation,
      gmanagers=self.addresses,
      faults=self.faults,
      host=host,
    )

  def _device(self) -> FakeDevice:
    return FakeDevice(
      [0] * self.num_blocks, [0] * self.num_blocks, [0] * self.host_blocks
    )

  def restart(self, instance: int) -> None:
    """An instance loses all that it had, and begins anew."""
    self.incarnations[instance] += 1
    self.managers[instance] = self._manager(instance, len(self.managers))
    self.devices[instance] = self._device()
    self.transport.register(instance, self.managers[instance].on_message)
    self.moves = collections.deque(
      move for move in self.moves if move.src_instance != instance
    )
    self.swaps = collections.deque(
      (owner, swap) for owner, swap in self.swaps if owner != instance
    )

  # Control plane.

  @property
  def gmanager(self) -> GManager:
    """The first gManager."""
    return self.gmanagers[GMANAGER]

  def _to_gmanager(self, envelope: Envelope) -> None:
    if envelope.receiver in self.gmanagers:
      self.gmanagers[envelope.receiver].on_message(envelope)

  def carry(self) -> bool:
    """Sends what managers have to say, once, and applies their effects."""
    for manager in (*self.managers, *self.gmanagers.values()):
      for envelope in manager.drain_messages():
        self.transport.send(envelope)
    happened = self.transport.deliver() > 0
    for instance, device in enumerate(self.devices):
      for effect in self.managers[instance].drain_effects():
        happened = True
        match effect:
          case GrantEpochs(block_ids=block_ids, epochs=epochs):
            for block_id, epoch in zip(block_ids, epochs, strict=True):
              device.epoch[block_id] = epoch
              if epoch != NO_EPOCH:
                device.tag[block_id] = 0
          case MoveBlocks(moves=moves):
            self.moves.extend(moves)
          case SwapBlocks():
            self.swaps.append((instance, effect))
    return happened

  def tick(self, seconds: float = 1.0) -> None:
    """Lets time pass: heartbeats and resends become due."""
    self.now_s += seconds
    for manager in (*self.managers, *self.gmanagers.values()):
      manager.tick()

  def exchange(self, quota: int = 1000) -> bool:
    """Moves payloads as `cache/movement.py` does, at most `quota` of them."""
    sent = [self.moves.popleft() for _ in range(min(quota, len(self.moves)))]
    for move in sent:
      self.receive(move)
    for instance, manager in enumerate(self.managers):
      mine = [move for move in sent if move.src_instance == instance]
      if mine:
        manager.on_exchanged(mine)
    return bool(sent)

  def lose_payload(self) -> None:
    """A payload goes out but is not received."""
    move = self.moves.popleft()
    self.refused_payloads += 1
    self.managers[move.src_instance].on_exchanged([move])

  def receive(self, move: Move) -> None:
    """Writes one payload to its destination, or refuses it."""
    source = self.devices[move.src_instance]
    target = self.devices[move.dst_instance]
    is_granted = target.epoch[move.dst_block] == move.dst_epoch
    if not is_granted or source.tag[move.src_block] != move.src_tag:
      self.refused_payloads += 1
      return
    target.tag[move.dst_block] = move.dst_tag

  def swap(self, *, spoils: bool = False) -> bool:
    """Copies the oldest rBlocks between tiers, if any, and acknowledges.

    Args:
      spoils: Lose what is copied.
    """
    if not self.swaps:
      return False
    instance, effect = self.swaps.popleft()
    device = self.devices[instance]
    is_out = effect.to_tier is Tier.HOST
    source = device.tags(Tier.HBM if is_out else Tier.HOST)
    target = device.tags(effect.to_tier)
    for one in effect.swaps:
      is_right = source[one.src_block] == one.src_tag and not spoils
      target[one.dst_block] = one.dst_tag if is_right else 0
    self.managers[instance].swapping.on_swapped(effect)
    return True

  def verify(self) -> bool:
    """Proves or refutes moved rBlocks."""
    happened = False
    for instance, manager in enumerate(self.managers):
      for uid in manager.unverified():
        happened = True
        num_full = self.proved[uid] // BLOCK_SIZE
        is_proved = self.covers(instance, uid, num_full * BLOCK_SIZE)
        manager.on_verified(uid, is_proved)
    return happened

  def settle(self, quota: int = 1000) -> None:
    """Carries on until nobody has anything to do without time passing."""
    for _ in range(1000):
      happened = self.carry()
      happened |= self.exchange(quota)
      happened |= self.is_copying and self.swap()
      happened |= self.verify()
      if not happened:
        return
    raise AssertionError("The managers did not come to rest.")

  def introduce(self) -> None:
    """Everybody has heard of everybody, as after some time together."""
    for sender, receiver in itertools.permutations(
      range(len(self.managers)), 2
    ):
      self.managers[receiver].on_message(
        Envelope(
          sender=sender,
          receiver=receiver,
          incarnation=self.incarnations[sender],
          seq=1,
          body=Renew(sent_s=self.now_s),
          meant_for=self.incarnations[receiver],
        )
      )
    self.settle()

  def heartbeat(self) -> None:
    """Everybody knows of everybody's room, and nothing is under way."""
    for _ in range(2):
      self.tick()
      self.settle()

  # Requests.

  def open(self, instance: int, uid: int, num_tokens: int) -> BlockTable:
    """Starts a request and computes its first tokens."""
    table = self.managers[instance].open(uid)
    self.proved[uid] = 0
    self.compute(instance, uid, num_tokens)
    return table

  def compute(self, instance: int, uid: int, num_tokens: int) -> None:
    """Allocates, writes, proves and confirms more tokens of a request."""
    manager = self.managers[instance]
    start = self.proved[uid]
    end = start + num_tokens
    missing = -(-end // BLOCK_SIZE) - manager.table(uid).num_blocks
    assert missing <= 0 or manager.allocate(uid, missing)
    self.write(instance, uid, start, end)
    assert self.covers(instance, uid, end)
    manager.confirm(uid, end)
    self.proved[uid] = end

  def write(self, instance: int, uid: int, start: int, end: int) -> None:
    """Tags what a step over tokens `[start, end)` writes."""
    table = self.managers[instance].table(uid)
    for logical_id in range(start // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
      filled = min(BLOCK_SIZE, end - logical_id * BLOCK_SIZE)
      block_id = table.location(logical_id).block_id
      self.devices[instance].tag[block_id] = table.tag(logical_id, filled)

  def covers(self, instance: int, uid: int, num_tokens: int) -> bool:
    """Whether a step over a request would be proved."""
    manager = self.managers[instance]
    table = manager.table(uid)
    local = table.local_entries().below(-(-num_tokens // BLOCK_SIZE))
    total = self._coverage(instance, local)
    spill = manager.spill(uid)
    if spill is not None:
      for holder in range(len(self.managers)):
        answer = self._answer(instance, holder, spill)
        total = add_coverage(total, self._coverage(holder, answer))
    return total == table.demand(num_tokens)

  def _answer(self, owner: int, holder: int, spill: SpillInfo) -> EntrySpan:
    """Entries of the table that a creditor answers with, as its device."""
    named = (owner, spill.slot, spill.slot_epoch, spill.versions.get(holder))
    for hosted in self.managers[holder].hosted.versions():
      if named == (
        hosted.owner,
        hosted.slot,
        hosted.slot_epoch,
        hosted.version,
      ):
        return hosted.entries
    return EntrySpan.of()

  def _coverage(self, instance: int, entries: EntrySpan) -> int:
    total = 0
    for block_id, logical_id in zip(
      entries.block_ids.tolist(), entries.logical_ids.tolist(), strict=True
    ):
      tag = self.devices[instance].tag[block_id]
      total = add_coverage(total, mix_tag(tag, logical_id))
    return total

  # Checks.

  def check(self) -> None:
    """What must hold after every event."""
    for manager, device in zip(self.managers, self.devices, strict=True):
      check_books(manager, manager._debtor._accounts)
      cap = self.lending.max_lent_blocks
      assert cap is None or manager.pool.num_lent <= cap
      assert device.epoch[0] == 0

  def check_agreement(self) -> None:
    """What must hold when all messages have arrived."""
    for creditor, lender in enumerate(self.managers):
      for debtor, borrower in enumerate(self.managers):
        assert lender.lent().get(debtor, 0) == borrower.borrowed().get(
          creditor, 0
        )

  def check_empty(self) -> None:
    """What must hold when no request is left."""
    for manager, device in zip(self.managers, self.devices, strict=True):
      counts = manager.counts()
      assert counts.free == counts.total, counts
      host = manager.counts(Tier.HOST)
      assert host.free == host.total == max(self.host_blocks - 1, 0), host
      assert manager.lent() == manager.borrowed() == {}
      assert manager.num_free_slots == self.lending.spill_slots
      assert not any(device.epoch)
      assert not any(len(v.entries) for v in manager.hosted.versions())
