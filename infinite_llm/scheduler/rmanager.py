"""The rManager of an instance: its rBlocks, at home and elsewhere."""

from collections.abc import Callable, Iterable, Sequence

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.config import LendingConfig
from infinite_llm.errors import InvariantError
from infinite_llm.rules import require
from infinite_llm.scheduler.account import Account, Phase, Reconcile, SpillInfo
from infinite_llm.scheduler.condition import Condition
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.effects import Effect, Move
from infinite_llm.scheduler.fault_points import Mishap, no_fault
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.mailbox import Outbox
from infinite_llm.scheduler.messages import (
  GMANAGER,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  GManagerAddress,
  MoveKvcache,
  RecallKvcache,
)
from infinite_llm.scheduler.overflow import Overflow
from infinite_llm.scheduler.plans import PlanFollower
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.scheduler.reception import Reception
from infinite_llm.scheduler.reporter import Reporter
from infinite_llm.scheduler.screening import Group
from infinite_llm.scheduler.swapping import HostTier, Swapping
from infinite_llm.types import (
  FaultPoint,
  InstanceId,
  PoolCounts,
  RequestUid,
  Tier,
)

__all__ = ["RManager", "Reconcile", "SpillInfo"]


class RManager:
  """Manages one instance's rBlocks, for its own requests and for others'.

  It decides and keeps books; it sends nothing and touches no device. Messages
  go in through `on_message` and out through `drain_messages`; what the devices
  are to do comes out of `drain_effects`, and `on_exchanged`, `on_verified`,
  `swapping.on_swapped` and `overflow.on_copied` tell what they did.

  Attributes:
    instance: The instance.
    pool: Books of its rBlocks in HBM.
    swapping: Preempted requests whose rBlocks wait in HOST.
    overflow: The running request that keeps rBlocks there.
    hosted: Tables of what it hosts for others.
    condition: What it tells the gManagers of itself.
    plans: What it does about the gManager's plans.
    allotted_to: Arrival number of the waiting request that may come in on the
      strength of `lendable_elsewhere`; 0 if none may.
    refused: Messages that no sane sender would send, by the name of their kind.
    void: Messages of gManagers that came too late to count, by why.
  """

  def __init__(
    self,
    instance: InstanceId,
    num_instances: int,
    pool: BlockPool,
    block_size: int,
    lending: LendingConfig,
    clock: Callable[[], float],
    incarnation: int = 1,
    gmanagers: Sequence[GManagerAddress] = (GMANAGER,),
    faults: FaultPoint = no_fault,
    host: HostTier | None = None,
  ):
    """Makes the manager of an instance without requests.

    Args:
      instance: The instance.
      num_instances: I, instances of its lending group.
      pool: Its rBlocks in HBM, all free; as many as each of the group has.
      block_size: P, tokens per rBlock.
      lending: How the group shares its pools.
      clock: Monotonic seconds.
      incarnation: Rises each time this manager starts anew.
      gmanagers: Those that it reports to; it listens to the one that leads.
      faults: What goes wrong, in a simulation.
      host: Its rBlocks in host memory, all free; None if it has none.

    Raises:
      ConfigError: If a number makes no sense, it may lend more than it has or
        never anything, or a pool or an address is not what it should be.
    """
    total = pool.counts().total
    require(pool.instance == instance, "pool", f"of {instance}", pool.instance)
    require(block_size >= 1, "block_size", "at least 1", block_size)
    if num_instances > 1:
      lending.check_pool(total)
    self.instance = instance
    self.pool = pool
    self._faults = faults
    self._lending = lending
    self._policy = get_policy(lending.policy)
    self._outbox: Outbox[Account] = Outbox(
      instance, incarnation, clock, lending.resend_after_s
    )
    # One list, in order: an rBlock may concern one half after the other.
    effects = self._effects = list[Effect]()
    self._creditor = Creditor(pool, block_size, lending, clock, effects, faults)
    debtor = self._debtor = Debtor(
      pool, block_size, lending, clock, self._outbox, effects, faults
    )
    self.swapping = Swapping(debtor, pool, host, block_size, faults)
    self.overflow = Overflow(
      debtor, pool, host and host.pool, host and host.overflow, block_size
    )
    self.condition = Condition(pool, self._creditor, debtor)
    self._reporter = Reporter(self._outbox, lending, clock, gmanagers)
    self._group = Group(
      instance=instance,
      num_instances=num_instances,
      num_blocks=total + 1,
      spill_slots=lending.spill_slots,
      host_blocks=self.overflow.most_blocks,
      gmanagers=gmanagers,
    )
    self._reception = Reception(
      self._group,
      incarnation,
      clock,
      self._creditor,
      self._debtor,
      self._outbox,
      self._reporter,
      faults,
    )
    self.plans = PlanFollower(self._creditor, debtor, effects, lending, clock)
    self.refused = self._reception.refused
    self.void = self._reporter.void
    self._lendable_elsewhere = 0
    self.allotted_to = 0

  @property
  def hosted(self) -> HostedTables:
    """Tables of what this instance hosts for others."""
    return self._creditor.hosted

  @property
  def num_free_slots(self) -> int:
    """Spill slots that no request has."""
    return self._debtor.num_free_slots

  def counts(self, tier: Tier = Tier.HBM) -> PoolCounts:
    """How the instance's rBlocks of one tier are used."""
    return self.swapping.counts() if tier is Tier.HOST else self.pool.counts()

  def lent(self) -> dict[InstanceId, int]:
    """rBlocks kept for each debtor, promised ones included."""
    return self._creditor.lent()

  def borrowed(self) -> dict[InstanceId, int]:
    """rBlocks held at each creditor, those being given back included."""
    return self._debtor.borrowed()

  def lendable_elsewhere(self) -> int:
    """rBlocks that all others would lend, as far as is known."""
    return self._lendable_elsewhere

  # Own requests.

  def open(self, uid: RequestUid) -> BlockTable:
    """Takes a request in.

    Returns:
      Its table, still empty; it stays the same object until `close`.

    Raises:
      InvariantError: If it is open, or waits in HOST.
    """
    self.swapping.check_absent(uid)
    return self._debtor.open(uid)

  def table(self, uid: RequestUid) -> BlockTable:
    """Where an open request's rBlocks lie."""
    return self._debtor.account(uid).table

  def allocate(self, uid: RequestUid, num_blocks: int) -> bool:
    """Adds local rBlocks to an open request, all or none; whether it did."""
    is_allowed = self.overflow.room(uid, num_blocks) == num_blocks
    return is_allowed and self._debtor.allocate(uid, num_blocks)

  def confirm(self, uid: RequestUid, num_tokens: int) -> None:
    """Notes that a step proved the KV of a request's first tokens."""
    self._debtor.confirm(uid, num_tokens)
    self.swapping.on_proved(uid)

  def close(self, uid: RequestUid) -> None:
    """Gives back all rBlocks of a request, in whatever state they are.

    Local ones are free at once, those elsewhere when their creditors say so,
    and those that are being copied between tiers when that is acknowledged.

    Args:
      uid: An open request.
    """
    kept = {*self.swapping.drop(uid), *self.overflow.drop(uid)}
    self._debtor.close(uid, kept=kept)

  # Steps.

  def spill(self, uid: RequestUid) -> SpillInfo | None:
    """How a group program names a request; None if all of it is at home."""
    return self._debtor.spill(uid)

  def resident_blocks(self, uid: RequestUid) -> int:
    """rBlocks of a request, if all are at home and at rest; else 0."""
    return self._debtor.account(uid).resident_blocks()

  def slot(self, uid: RequestUid) -> int:
    """Spill slot of a request that has one: also once all of it came home."""
    return self._debtor.account(uid).current_slot().slot

  def is_readable(self, uid: RequestUid) -> bool:
    """Whether a step may read a request's rBlocks now, wherever they are."""
    return self._debtor.is_readable(uid)

  def phase(self, uid: RequestUid) -> Phase:
    """What is under way with a request's rBlocks."""
    return self._debtor.account(uid).phase

  def lost(self) -> tuple[RequestUid, ...]:
    """Open requests with rBlocks that are gone, so that they must recompute."""
    return self._debtor.lost()

  def reconcile(self, uid: RequestUid) -> Reconcile:
    """Reacts to a step of a request that could not be proved.

    Moves that nobody proved yet are undone first; if there are none, all
    creditors install their tables anew; else only recomputing helps. A proved
    step begins this anew.

    Args:
      uid: An open request.

    Returns:
      Whether the same step is to be tried again, once the request is readable,
      or its KV to be given up.
    """
    return self._debtor.reconcile(uid)

  # Borrowing.

  def movable_blocks(self, uid: RequestUid) -> int:
    """rBlocks of a request that a borrow could move now; 0 while it is busy."""
    return self._debtor.movable_blocks(uid)

  def choose_victim(self, uids: Iterable[RequestUid]) -> RequestUid | None:
    """Which open request the policy has make room; None if nothing can move."""
    movable = [(uid, self.movable_blocks(uid)) for uid in uids]
    return self._policy.choose_victim(movable)

  @property
  def num_borrows(self) -> int:
    """Borrows that were ever begun, planned moves included."""
    return self._debtor.num_borrows

  def is_borrowing(self) -> bool:
    """Whether a borrow of any open request is under way."""
    return self._debtor.is_borrowing()

  def borrow(self, uid: RequestUid, num_blocks: int) -> bool:
    """Starts to move a request's oldest rBlocks to other instances.

    Only full, proved ones. Candidates are tried in turn, for what is missing.

    Args:
      uid: An open request.
      num_blocks: About how many.

    Returns:
      Whether it was started. False if the request is busy, has nothing to move
      or cannot get a spill slot, and if nobody is thought to have room: as the
      last status of the cluster says, or because everybody refused since.
    """
    return self._debtor.borrow(uid, num_blocks)

  def move_kvcache(
    self, uid: RequestUid, num_blocks: int, dst: InstanceId
  ) -> bool:
    """Starts to move a request's oldest rBlocks to one other instance.

    As `borrow`, but nobody is asked for candidates, and a refusal ends it.

    Args:
      uid: An open request.
      num_blocks: At most how many.
      dst: Another instance of the group.

    Returns:
      Whether it was started: not if the request is busy, has nothing to move or
      cannot get a spill slot, and not while the instance is frozen.
    """
    self._check_peer("dst", dst)
    return self._debtor.move_kvcache(uid, num_blocks, dst)

  def recall_kvcache(
    self, uid: RequestUid, num_blocks: int, src: InstanceId
  ) -> bool:
    """Starts to move a request's newest rBlocks at a creditor home.

    Args:
      uid: An open request.
      num_blocks: At most how many.
      src: The creditor.

    Returns:
      Whether it was started. False if the request is busy or cannot be read,
      has nothing there, or no rBlock is free at home.
    """
    self._check_peer("src", src)
    return self._debtor.recall_kvcache(uid, num_blocks, src)

  @property
  def is_frozen(self) -> bool:
    """Whether requests get no rBlocks for now, here or elsewhere."""
    self.plans.thaw_if_due()
    return self._debtor.is_frozen

  def on_exchanged(self, moves: Iterable[Move]) -> None:
    """Notes that payloads of this instance were sent."""
    self._reception.on_exchanged(tuple(moves))

  def unverified(self) -> tuple[RequestUid, ...]:
    """Requests that read moved rBlocks which no step has proved yet."""
    return self._debtor.unverified()

  def on_verified(self, uid: RequestUid, is_proved: bool) -> None:
    """Ends a move: proved copies replace the old ones, others are dropped."""
    self._debtor.on_verified(uid, is_proved)

  # Messages and effects.

  def on_message(self, envelope: Envelope) -> None:
    """Takes a message, perhaps late; nonsense is `refused` and counted."""
    epoch = self._reporter.leader_epoch
    guidance = self._reception.on_message(envelope)
    if self._reporter.leader_epoch != epoch:
      # The new leader may allot the same rBlocks to somebody else.
      self.allotted_to = 0
    match guidance:
      case ClusterStatus(lendable=lendable, allotted_to=allotted_to):
        self._lendable_elsewhere = lendable
        self.allotted_to = allotted_to
        self._debtor.on_status(lendable > 0)
      case FullHeartbeatRequest():
        self._tell(is_full=True)
      case MoveKvcache() | RecallKvcache() as plan:
        self.plans.follow(plan)
      case None:
        pass

  def tick(self) -> None:
    """Does what is due: ends and renews leases, asks again, reports."""
    self.plans.thaw_if_due()
    self._creditor.end_expired()
    self._debtor.tick()
    self._outbox.resend()
    if self._reporter.is_due() and not self._faults(Mishap.HEARTBEAT_SKIPPED):
      self._debtor.renew()
      self._tell()

  def renew(self) -> None:
    """Tells creditors that this owner lives, and does nothing else."""
    self._debtor.renew()

  def drain_messages(self) -> list[Envelope]:
    """Takes the messages that are to be sent now."""
    return self._outbox.drain()

  def drain_effects(self) -> list[Effect]:
    """Takes what the devices are to do now, in this order."""
    effects, self._effects[:] = self._effects[:], []
    swaps = self.swapping.drain_effects() + self.overflow.drain_effects()
    return effects + swaps

  def _tell(self, *, is_full: bool = False) -> None:
    heartbeat = self.condition.heartbeat(self._reporter.leader_epoch)
    self._reporter.tell(heartbeat, is_full=is_full)

  def _check_peer(self, name: str, peer: InstanceId) -> None:
    num_instances = self._group.num_instances
    if peer == self.instance or not 0 <= peer < num_instances:
      raise InvariantError(
        f"{name} must be another instance in [0, {num_instances}); got"
        f" {peer} on instance {self.instance}."
      )
