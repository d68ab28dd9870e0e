"""One instance of a simulated cluster: real managers over a model device.

Each event ends with the checks that concern this instance alone; all of them
are cheap. What is wrong is raised as a `ViolationError` where it happens.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.errors import CoverageError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.effects import Move, MoveBlocks
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import Reserve
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  CandidatesRequest,
  Envelope,
)
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import Row
from infinite_llm.simulator.data_plane import DataPlane, Piece
from infinite_llm.simulator.lease_history import (
  LEASE_REPLIES,
  LEASE_REQUESTS,
  LeaseHistory,
)
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.scenario import Scenario
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import (
  NO_EPOCH,
  Epoch,
  FaultPoint,
  InstanceId,
  RequestUid,
)

EPOCHS_PER_INCARNATION = 100_000
"""A pool that begins anew begins beyond the epochs of the lost one."""


@dataclasses.dataclass(kw_only=True, eq=False)
class World:
  """What the instances of one cluster share.

  Attributes:
    scenario: Sizes and troubles.
    rng: Decides all that happens by chance.
    network: Carries messages; its time is the time.
    plane: All devices.
    instances: Those that are up, and the last life of those that are not.
    is_healed: Nothing goes wrong any more.
    has_jumped: A clock has jumped, by more than leases allow for.
    num_payloads_lost: Payloads that never arrived.
    num_payloads_repeated: Payloads that were sent once more.
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
  instances: "list[Instance]" = dataclasses.field(
    default_factory=list["Instance"]
  )
  is_healed: bool = False
  has_jumped: bool = False
  num_payloads_lost: int = 0
  num_payloads_repeated: int = 0
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
    return [instance.manager.hosted for instance in self.instances]


class Instance:
  """One life of an instance, from its start to its crash.

  Attributes:
    number: Which instance.
    incarnation: Which of its lives.
    manager: Its rManager.
    batcher: Its requests.
    history: What it may have lent.
    requests: Requests that it has taken, by uid.
    is_up: Whether it lives.
  """

  def __init__(
    self,
    number: InstanceId,
    incarnation: int,
    world: World,
    faults: FaultPoint,
  ):
    """Starts an instance without requests.

    Args:
      number: Which instance.
      incarnation: Rises with each start.
      world: What it shares with the others.
      faults: What goes wrong inside of its manager.
    """
    scenario = world.scenario
    self.number = number
    self.incarnation = incarnation
    self.requests: dict[RequestUid, Request] = {}
    self.is_up = True
    self._world = world
    self._clock = world.network.clock(number)
    pool = BlockPool(
      number,
      scenario.num_blocks,
      (incarnation - 1) * EPOCHS_PER_INCARNATION,
    )
    self.manager = RManager(
      instance=number,
      num_instances=scenario.num_instances,
      pool=pool,
      block_size=scenario.block_size,
      lending=scenario.lending,
      clock=self._clock,
      incarnation=incarnation,
      gmanagers=(GMANAGER, STANDBY),
      faults=faults,
    )
    self.batcher = Batcher(
      self.manager,
      scenario.scheduler,
      scenario.lending,
      scenario.block_size,
    )
    self.history = LeaseHistory(
      number,
      incarnation,
      lease_s=scenario.lending.lease_s,
      max_lent_blocks=scenario.lending.max_lent_blocks,
      now_s=self._clock(),
    )
    self._heard: dict[tuple[InstanceId, int, int], Envelope] = {}
    self._newest_seq = 0
    self._leader_epoch: Epoch = NO_EPOCH
    self._incarnation_of: dict[InstanceId, int] = {}
    self._moves: list[Move] = []
    self._ghosts: list[Move] = []
    self._is_exchange_due = False
    self._flight: tuple[tuple[Row, bool], ...] = ()

  @property
  def num_spill_slots(self) -> int:
    """S, spill slots that it has in all."""
    return self._world.scenario.lending.spill_slots

  @property
  def has_flight(self) -> bool:
    """Whether a step is under way."""
    return bool(self._flight)

  @property
  def is_quiet(self) -> bool:
    """Whether no step and no payload is under way."""
    return not (self._flight or self._moves or self._ghosts)

  def start(self) -> None:
    """Begins to tick, some time soon."""
    tick_s = self._world.scenario.tick_s
    self._wake(tick_s * self._world.rng.random(), self._tick)

  def on_message(self, envelope: Envelope) -> None:
    """Takes a message."""
    sender = envelope.sender
    if isinstance(sender, int):
      self.history.on_heard(envelope, self._clock())
      if isinstance(envelope.body, LEASE_REQUESTS):
        self._heard[sender, envelope.incarnation, envelope.seq] = envelope
      self.manager.on_message(envelope)
      self._check_restart(sender, envelope)
      self.settle(envelope)
    elif envelope.leader_epoch < self._leader_epoch:
      self._take_fenced(envelope)
    else:
      self._leader_epoch = envelope.leader_epoch
      self.manager.on_message(envelope)
      self.settle(envelope)

  def settle(self, cause: Envelope | None = None) -> None:
    """Sends what the manager says, does what it wants, checks what it has.

    Args:
      cause: The message that it has just taken, if that was it.
    """
    world = self._world
    for envelope in self.manager.drain_messages():
      self._check_outgoing(envelope, cause)
      world.network.send(envelope)
    for effect in self.manager.drain_effects():
      if isinstance(effect, MoveBlocks):
        self._moves += effect.moves
        self._schedule_exchange()
      else:
        world.plane.grant(self.number, effect)
    self._check_books()

  def add(self, request: Request) -> None:
    """Takes a request."""
    self.requests[request.uid] = request
    self.batcher.add(request)

  def abort(self, uid: RequestUid) -> None:
    """Ends a request at somebody's wish."""
    self.batcher.abort(uid)
    self.settle()

  def check_payload(self, move: Move) -> None:
    """A payload that was accepted must be what its rBlock was granted for."""
    block = self.manager.pool.block(move.dst_block)
    if (block.uid, block.epoch) != (move.uid, move.dst_epoch):
      raise ViolationError(f"{move} was written over {block}.")

  def stop(self) -> tuple[Request, ...]:
    """Crashes: all that it had is gone.

    Returns:
      Requests that it had not finished.
    """
    self.is_up = False
    self._moves.clear()
    self._ghosts.clear()
    self._flight = ()
    return self.batcher.running + self.batcher.waiting

  # What it does by itself.

  def _wake(self, delay_s: float, callback: Callable[[], None]) -> None:
    self._world.network.call_later(self.number, delay_s, callback)

  def _tick(self) -> None:
    self.manager.tick()
    self.history.on_ticked(self._clock())
    self.settle()
    if not self._flight:
      self._verify()
      self._step()
    self._wake(self._world.scenario.tick_s, self._tick)

  def _verify(self) -> None:
    """Proves or refutes moved rBlocks, as `LendingGroup` does."""
    unverified = self.manager.unverified()
    if not unverified:
      return
    size = self._world.scenario.block_size
    for uid in unverified:
      num_tokens = self.requests[uid].num_computed_tokens // size * size
      pieces = self._read(uid, num_tokens)
      if pieces is not None:
        self._check_proof(uid, pieces, num_tokens)
      else:
        self._check_trust(uid)
      self.manager.on_verified(uid, pieces is not None)
    self.settle()

  def _step(self) -> None:
    """Plans a step and launches it; what it proved is known later."""
    if not self.batcher.has_work:
      return
    plan = self.batcher.plan()
    self._take_ended()
    if plan.rows:
      self._flight = tuple((row, self._compute(row)) for row in plan.rows)
      self._wake(self._world.scenario.step_s, self._land)
    self.settle()

  def _compute(self, row: Row) -> bool:
    """Runs one row on the devices; whether its KV was proved."""
    world = self._world
    table = self.manager.table(row.uid)
    size = world.scenario.block_size
    for logical_id in range(row.start // size, -(-row.end // size)):
      location = table.location(logical_id)
      if location.instance != self.number:
        raise ViolationError(
          f"A step of request {row.uid} on instance {self.number} writes to"
          f" rBlock {location.block_id} of instance {location.instance}."
        )
      self._check_own(row.uid, location.block_id)
    world.plane.write_tags(table, row.start, row.end)
    pieces = self._read(row.uid, row.end)
    world.num_steps += 1
    world.num_unproved += pieces is None
    if pieces is not None:
      self._check_proof(row.uid, pieces, row.start)
    else:
      self._check_trust(row.uid)
    world.plane.write_tokens(
      table, row.start, row.end, is_right=pieces is not None
    )
    return pieces is not None

  def _land(self) -> None:
    """Commits the rows that were proved, and only those."""
    flight, self._flight = self._flight, ()
    for row, is_proved in flight:
      request = self.requests[row.uid]
      if request.status is not RequestStatus.RUNNING:
        continue  # It was aborted meanwhile.
      if not is_proved:
        self.batcher.row_failed(row)
        continue
      self._world.progress_s = self._world.network.now_s
      self.batcher.advance(row)
      if row.samples:
        request.output_token_ids.append(row.end)
        self._world.num_tokens += 1
        if request.num_tokens == request.max_total_tokens:
          self.batcher.finish(row.uid, RequestStatus.FINISHED_LENGTH)
    self._take_ended()
    self.settle()

  def _take_ended(self) -> None:
    while (request := self.batcher.take_ended()) is not None:
      error = request.error
      self._world.num_failed += error is not None
      if error is not None and not isinstance(error, CoverageError):
        raise ViolationError(f"Request {request.uid} failed: {error}")

  def _schedule_exchange(self) -> None:
    if not self._is_exchange_due:
      self._is_exchange_due = True
      delay_s = self._world.scenario.exchange_s * self._world.rng.random()
      self._wake(delay_s, self._exchange)

  def _exchange(self) -> None:
    """Sends some waiting payloads, in any order."""
    world = self._world
    scenario, rng = world.scenario, world.rng
    self._is_exchange_due = False
    for ghost in self._ghosts:
      self._send_payload(ghost)
    self._ghosts.clear()
    quota = scenario.lending.exchange_blocks
    if len(self._moves) > 1:
      quota = rng.randint(1, len(self._moves))
      rng.shuffle(self._moves)
    sent, self._moves = self._moves[:quota], self._moves[quota:]
    for move in sent:
      if not world.is_healed and rng.random() < scenario.payload_lost:
        world.num_payloads_lost += 1
        world.tell(f"payload lost: {move}")
      else:
        self._send_payload(move)
      if not world.is_healed and rng.random() < scenario.payload_repeated:
        world.num_payloads_repeated += 1
        self._ghosts.append(move)
    if sent:
      world.progress_s = world.network.now_s
      self.manager.on_exchanged(sent)
      self.settle()
    if self._moves or self._ghosts:
      self._schedule_exchange()

  def _send_payload(self, move: Move) -> None:
    receiver = self._world.instances[move.dst_instance]
    if receiver.is_up and self._world.plane.exchange(move):
      receiver.check_payload(move)

  # Checks.

  def _take_fenced(self, envelope: Envelope) -> None:
    """Whatever a former leader says must change nothing."""
    before = self._sees_of_gmanagers()
    self.manager.on_message(envelope)
    outgoing = self.manager.drain_messages()
    effects = self.manager.drain_effects()
    if outgoing or effects or self._sees_of_gmanagers() != before:
      raise ViolationError(
        f"Instance {self.number} has heard of leader epoch"
        f" {self._leader_epoch}, and obeys {envelope}."
      )

  def _sees_of_gmanagers(self) -> tuple[int, bool, bool]:
    manager = self.manager
    return (
      manager.lendable_elsewhere(),
      manager.is_frozen,
      manager.is_borrowing(),
    )

  def _read(self, uid: RequestUid, num_tokens: int) -> tuple[Piece, ...] | None:
    """What a program reads of a request; None if that was not proved."""
    table = self.manager.table(uid)
    spill = self.manager.spill(uid)
    hosted = self._world.hosted() if spill else ()
    reading = self._world.plane.read(table, spill, hosted, num_tokens)
    if reading.coverage != table.demand(num_tokens):
      return None
    return reading.pieces

  def _check_proof(
    self, uid: RequestUid, pieces: tuple[Piece, ...], num_tokens: int
  ) -> None:
    """Holds what a program proved to have read against the truth."""
    fault = self._world.plane.wrong_piece(uid, pieces, num_tokens)
    if fault is not None:
      raise ViolationError(
        f"Request {uid} on instance {self.number} proved its KV, but {fault}."
      )
    for holder, block_id, logical_id in pieces:
      if holder == self.number:
        self._check_own(uid, block_id)
        continue
      lender = self._world.instances[holder]
      lease = lender.history.lease(self.number, self.incarnation, block_id)
      if lease is None or lease.uid != uid:
        raise ViolationError(
          f"Request {uid} on instance {self.number} reads logical rBlock"
          f" {logical_id} from rBlock {block_id} of instance {holder} without"
          f" a live lease; there is {lender.history.leases.get(block_id)}."
        )

  def _check_trust(self, uid: RequestUid) -> None:
    """An owner trusts only leases that live, as far as it can know."""
    world = self._world
    if world.has_jumped or not self.manager.is_readable(uid):
      return
    table = self.manager.table(uid)
    for creditor in table.creditors():
      lender = world.instances[creditor]
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

  def _check_restart(self, sender: InstanceId, envelope: Envelope) -> None:
    """What lay at a creditor that began anew is in nobody's books."""
    incarnation = envelope.responder or envelope.incarnation
    if incarnation > self._incarnation_of.get(sender, 0):
      self._incarnation_of[sender] = incarnation
      borrowed = self.manager.borrowed().get(sender, 0)
      if borrowed:
        raise ViolationError(
          f"Instance {self.number} has heard of life {incarnation} of instance"
          f" {sender}, and still counts {borrowed} rBlocks there."
        )

  def _check_own(self, uid: RequestUid, block_id: int) -> None:
    block = self.manager.pool.block(block_id)
    if (block.owner, block.uid) != (self.number, uid):
      raise ViolationError(
        f"Request {uid} on instance {self.number} uses a foreign {block}."
      )

  def _check_outgoing(self, envelope: Envelope, cause: Envelope | None) -> None:
    body, receiver = envelope.body, envelope.receiver
    if isinstance(body, LEASE_REPLIES) and isinstance(receiver, int):
      request = self._heard.get((receiver, envelope.incarnation, envelope.seq))
      if request is None:
        raise ViolationError(f"Nobody asked for the answer {envelope}.")
      self.history.on_answered(request, envelope, self._clock())
      return
    is_new = envelope.seq > self._newest_seq
    self._newest_seq = max(self._newest_seq, envelope.seq)
    if (
      is_new
      and isinstance(body, Reserve | CandidatesRequest)
      and cause is not None
      and isinstance(cause.body, Reserve)
    ):
      raise ViolationError(
        f"Instance {self.number} forwards a borrow: {cause.body} made it ask"
        f" {receiver!r}: {body}."
      )

  def _check_books(self) -> None:
    pool = self.manager.pool
    lent: Mapping[InstanceId, int] = self.manager.lent()
    self.history.check_books(lent)
    counts = pool.counts()
    if not counts.is_conserved() or not 0 <= counts.free <= counts.total:
      raise ViolationError(f"Instance {self.number} lost count: {counts}.")
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
