"""What is watched at one instance of a simulated cluster, at every event.

The checks concern what this instance does and says, and are cheap; those over
all instances are in `invariants.py`.
"""

import collections
import dataclasses
import math
import random
from collections.abc import Callable, Sequence

from infinite_llm.cache.rblock import BlockState
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import Reserve
from infinite_llm.scheduler.messages import (
  Address,
  CandidatesRequest,
  Envelope,
  MoveKvcache,
)
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.data_plane import DataPlane, Piece
from infinite_llm.simulator.lease_history import (
  LEASE_REPLIES,
  LEASE_REQUESTS,
  LeaseHistory,
)
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.obedience import Obedience
from infinite_llm.simulator.scenario import Scenario
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import (
  BlockId,
  Epoch,
  FaultPoint,
  InstanceId,
  RequestUid,
  Tier,
)

EPOCHS_PER_INCARNATION = 100_000
"""A pool that begins anew begins beyond the epochs of the lost one."""


_MOST_SILENT_S = 1.0
"""Silence of an owner that lives towards a creditor that all messages reach."""


@dataclasses.dataclass(kw_only=True, eq=False)
class World:
  """What the instances of one cluster share.

  Attributes:
    scenario: Sizes and troubles.
    rng: Decides all that happens by chance.
    network: Carries messages; its time is the time.
    plane: All devices.
    faults: Gives each manager its fault points.
    watches: One for each instance, of its present or last life.
    is_healed: Nothing goes wrong any more.
    settled_s: Since when nothing of before is on its way either.
    jumped_s: When each clock last jumped, by more than leases allow for.
    nonsense: Messages that must be refused, by `id`.
    num_payloads_lost: Payloads that never arrived.
    num_payloads_repeated: Payloads that were sent once more.
    num_copies_lost: Copies between tiers that brought nothing.
    num_slabs: Slabs of running requests that went to HOST.
    plans_followed: Plans of gManagers that were begun, by kind.
    num_behind: Steps that were launched behind one under way.
    num_steps: Rows that were computed.
    num_unproved: Rows of them whose KV was not proved.
    num_tokens: Tokens that were emitted.
    num_failed: Requests that failed because their KV was not proved again and
      again.
    progress_s: When something last went on.
    note: Hears of what is done beside messages; None costs nothing.
  """

  scenario: Scenario
  rng: random.Random
  network: SimulatedNetwork
  plane: DataPlane
  faults: Callable[[Address], FaultPoint]
  watches: "list[Watch]" = dataclasses.field(default_factory=list["Watch"])
  is_healed: bool = False
  settled_s: float = math.inf
  jumped_s: dict[Address, float] = dataclasses.field(
    default_factory=dict[Address, float]
  )
  nonsense: dict[int, Envelope] = dataclasses.field(
    default_factory=dict[int, Envelope]
  )
  num_payloads_lost: int = 0
  num_payloads_repeated: int = 0
  num_copies_lost: int = 0
  num_slabs: int = 0
  plans_followed: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter[str]
  )
  num_behind: int = 0
  num_steps: int = 0
  num_unproved: int = 0
  num_tokens: int = 0
  num_failed: int = 0
  progress_s: float = 0.0
  note: Callable[[float, str], None] | None = None

  def tell(self, what: str) -> None:
    """Notes something for a reader of the trace."""
    if self.note is not None:
      self.note(self.network.now_s, what)

  def hosted(self) -> Sequence[HostedTables]:
    """Tables of each instance."""
    return [watch.manager.hosted for watch in self.watches]


class Watch:
  """Sees all that one life of an instance hears, says and reads.

  Attributes:
    number: Which instance.
    incarnation: Which of its lives.
    manager: Its rManager.
    history: What it may have lent.
    is_up: Whether it lives.
  """

  def __init__(self, manager: RManager, incarnation: int, world: World):
    """Begins to watch an instance that has just started.

    Args:
      manager: Its rManager.
      incarnation: Which of its lives.
      world: What it shares with the others.
    """
    lending = world.scenario.lending
    self.number = manager.instance
    self.incarnation = incarnation
    self.manager = manager
    self.is_up = True
    self._clock = world.network.clock(self.number)
    self.history = LeaseHistory(
      self.number,
      incarnation,
      lease_s=lending.lease_s,
      max_lent_blocks=lending.max_lent_blocks,
      now_s=self._clock(),
    )
    self._world = world
    self._heard: dict[tuple[InstanceId, int, int], Envelope] = {}
    self._newest_seq = 0
    self._num_wanted = 0
    self._num_counted = -1
    self._obedience = Obedience(manager)
    self._incarnation_of: dict[InstanceId, int] = {}
    self._owner_heard_s: dict[InstanceId, float] = {}
    self._longest_silence_s = (lending.lease_s + world.scenario.tick_s) / (
      1 - world.scenario.clock_rate
    )

  def hand_over(self, envelope: Envelope) -> None:
    """Gives the manager a message; what it says and does comes after."""
    sender = envelope.sender
    if isinstance(sender, int):
      self.history.on_heard(envelope, self._clock())
      if isinstance(envelope.body, LEASE_REQUESTS):
        self._heard[sender, envelope.incarnation, envelope.seq] = envelope
      incarnation = envelope.responder or envelope.incarnation
      known = self._incarnation_of.get(sender, 0)
      if incarnation >= known:
        self._owner_heard_s[sender] = self._world.network.now_s
      lent = self._lent_to(sender) if incarnation > known else ()
      self.manager.on_message(envelope)
      if incarnation > known:
        self._incarnation_of[sender] = incarnation
        self._check_restart(sender, incarnation, lent)
    else:
      self._hand_over_guidance(envelope)

  def want_borrows(self) -> None:
    """Notes that those borrows are wanted that have just been begun.

    The instance's own requests want them, or whoever plans; nobody else may.
    """
    self._num_wanted = self.manager.num_borrows

  def tick(self) -> None:
    """Has the manager do what is due."""
    self.manager.tick()
    self._check_dead_debts()
    self.history.on_ticked(self._clock())

  def refute(self, uid: RequestUid) -> None:
    """Has the manager return to old copies, which must still be there."""
    pool = self.manager.pool
    moving = [
      block
      for block in map(pool.block, range(1, pool.counts().total + 1))
      if (block.state, block.uid) == (BlockState.MOVING, uid)
    ]
    self.manager.on_verified(uid, False)
    for block in moving:
      if block.uid != uid:
        raise ViolationError(
          f"Request {uid} on instance {self.number} gave up {block}, whose copy"
          " was not proved."
        )

  def read(self, uid: RequestUid, num_tokens: int) -> tuple[Piece, ...] | None:
    """What a program reads of a request; None if that was not proved."""
    table = self.manager.table(uid)
    spill = self.manager.spill(uid)
    hosted = self._world.hosted() if spill else ()
    reading = self._world.plane.read(table, spill, hosted, num_tokens)
    if reading.coverage != table.demand(num_tokens):
      return None
    return reading.pieces

  def check_proof(
    self, uid: RequestUid, pieces: tuple[Piece, ...], num_tokens: int
  ) -> None:
    """Holds what a program proved to have read against the truth."""
    fault = self._world.plane.wrong_piece(uid, pieces, num_tokens)
    if fault is not None:
      raise ViolationError(
        f"Request {uid} on instance {self.number} proved its KV, but {fault}."
      )
    for holder, block_id, logical_id in pieces:
      if holder in (self.number, ~self.number):
        self.check_own(uid, block_id, Tier.HBM if holder >= 0 else Tier.HOST)
        continue
      lender = self._world.watches[holder]
      lease = lender.history.lease(self.number, self.incarnation, block_id)
      if lease is None or lease.uid != uid:
        raise ViolationError(
          f"Request {uid} on instance {self.number} reads logical rBlock"
          f" {logical_id} from rBlock {block_id} of instance {holder} without"
          f" a live lease; there is {lender.history.leases.get(block_id)}."
        )

  def check_trust(self, uid: RequestUid) -> None:
    """An owner trusts only leases that live, as far as it can know.

    When the clock of a creditor has jumped ahead, it may have ended leases that
    the owner trusts for the rest of their time.
    """
    world = self._world
    if not self.manager.is_readable(uid):
      return
    table = self.manager.table(uid)
    for creditor in table.creditors():
      lender = world.watches[creditor]
      jumped_s = world.jumped_s.get(creditor, -math.inf)
      if world.network.now_s - jumped_s <= self._longest_silence_s:
        continue
      for _, location in table.hosted_entries(creditor):
        life = location.epoch // EPOCHS_PER_INCARNATION + 1
        if not lender.is_up or life != lender.incarnation:
          continue  # Of a creditor that began anew it has not heard yet.
        lease = lender.history.lease(
          self.number, self.incarnation, location.block_id
        )
        if lease is None or (lease.uid, lease.epoch) != (uid, location.epoch):
          raise ViolationError(
            f"Request {uid} on instance {self.number} trusts {location}, where"
            f" there is {lender.history.leases.get(location.block_id)}."
          )

  def check_own(
    self, uid: RequestUid, block_id: BlockId, tier: Tier = Tier.HBM
  ) -> None:
    """A request uses only rBlocks at home that are its own."""
    manager = self.manager
    pool = manager.pool if tier is Tier.HBM else manager.swapping.host_pool
    block = pool.block(block_id)
    if (block.owner, block.uid) != (self.number, uid):
      raise ViolationError(
        f"Request {uid} on instance {self.number} uses a foreign {block}."
      )

  def check_outgoing(self, envelope: Envelope) -> None:
    """Answers are right, and nobody asks for rBlocks that are not wanted.

    Args:
      envelope: What the manager says.
    """
    body, receiver = envelope.body, envelope.receiver
    if isinstance(body, LEASE_REPLIES) and isinstance(receiver, int):
      request = self._heard.get((receiver, envelope.incarnation, envelope.seq))
      if request is None:
        raise ViolationError(f"Nobody asked for the answer {envelope}.")
      self.history.on_answered(request, envelope, self._clock())
      return
    if envelope.seq <= self._newest_seq:
      return  # Said before.
    self._newest_seq = envelope.seq
    if isinstance(body, (Reserve, CandidatesRequest)) and (
      self.manager.num_borrows != self._num_wanted
    ):
      raise ViolationError(
        f"Instance {self.number} forwards a borrow: it asks {receiver!r} for"
        f" rBlocks that nobody here wants: {body}."
      )

  def check_books(self) -> None:
    """Nothing is lost from count, and leases are those of the history."""
    pool, swapping = self.manager.pool, self.manager.swapping
    self.history.check_books(self.manager.lent())
    # So often that it builds nothing, and counts only what may have changed.
    num_changes = pool.num_changes + swapping.num_changes
    if num_changes != self._num_counted:
      self._num_counted = num_changes
      if not (pool.is_conserved and swapping.is_conserved):
        raise ViolationError(
          f"Instance {self.number} lost count: {pool.counts()}, in HOST"
          f" {swapping.counts()}."
        )
    if pool.num_lent != len(self.history.leases):
      raise ViolationError(
        f"Instance {self.number} keeps {pool.num_lent} rBlocks for others, but"
        f" {len(self.history.leases)} leases live."
      )
    cap = self._world.scenario.lending.max_lent_blocks
    if cap is not None and pool.num_lent > cap:
      raise ViolationError(
        f"Instance {self.number} lent {pool.num_lent} rBlocks; its cap is"
        f" {cap}."
      )

  def check_payload(self, move: Move) -> None:
    """A payload that was accepted must be what its rBlock was granted for."""
    block = self.manager.pool.block(move.dst_block)
    if (block.uid, block.epoch) != (move.uid, move.dst_epoch):
      raise ViolationError(f"{move} was written over {block}.")

  def _hand_over_guidance(self, envelope: Envelope) -> None:
    """What the leading gManager says may be a plan, to move or to recall."""
    plans = self.manager.plans
    before = plans.num_followed
    self._obedience.hand_over(envelope)
    if plans.num_followed > before:
      self._world.plans_followed[type(envelope.body).__name__] += 1
      if isinstance(envelope.body, MoveKvcache):
        self.want_borrows()

  def _lent_to(self, owner: InstanceId) -> Sequence[tuple[BlockId, Epoch]]:
    """What is kept for an instance, in whatever incarnation."""
    pool = self.manager.pool
    blocks = map(pool.block, range(1, pool.counts().total + 1))
    return [(b.block_id, b.epoch) for b in blocks if b.owner == owner]

  def _check_restart(
    self,
    sender: InstanceId,
    incarnation: int,
    lent: Sequence[tuple[BlockId, Epoch]],
  ) -> None:
    """With an incarnation end its debts, `lent` by then, and those to it."""
    borrowed = self.manager.borrowed().get(sender, 0)
    if borrowed:
      raise ViolationError(
        f"Instance {self.number} has heard of life {incarnation} of instance"
        f" {sender}, and still counts {borrowed} rBlocks there."
      )
    kept = set(lent).intersection(self._lent_to(sender))
    if kept:
      raise ViolationError(
        f"Instance {self.number} has heard of life {incarnation} of instance"
        f" {sender}, and still keeps {sorted(kept)} for the one before."
      )

  def _check_dead_debts(self) -> None:
    """Debts of an incarnation vanish within the lease time of its last word.

    That is counted by the true time from when this creditor last heard the
    owner, or its own clock jumped, and as long as a lease and a tick last by
    the slowest clock. A successor that is heard ends them at once.
    """
    if not self.manager.pool.num_lent:
      return
    jumped_s = self._world.jumped_s.get(self.number, 0.0)
    for owner, count in self.manager.lent().items():
      since_s = max(self._owner_heard_s[owner], jumped_s)
      silent_s = self._world.network.now_s - since_s
      if silent_s > self._longest_silence_s:
        raise ViolationError(
          f"{count} rBlocks that instance {self.number} lent to instance"
          f" {owner} outlive its last word, by now {silent_s:.3f} s old."
        )
      # By now all of the dead are gone, and who has something here says so.
      rest_s = self._world.network.now_s - self._world.settled_s
      if rest_s > self._longest_silence_s and silent_s > _MOST_SILENT_S:
        raise ViolationError(
          f"{count} rBlocks lent by {self.number} to {owner}, which is silent"
          f" for {silent_s:.3f} s, were never given back."
        )
