"""One instance of a simulated cluster: real managers over a model device.

What is wrong is raised as a `ViolationError` where it happens.
"""

import collections
from collections.abc import Callable

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.errors import CoverageError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.effects import (
  DropOverflow,
  GrantEpochs,
  MigrateRequest,
  Move,
  MoveBlocks,
  OverflowBlocks,
  SwapBlocks,
)
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.messages import GMANAGER, STANDBY, Envelope
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import ANY, NOTHING, Ceiling, Row
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.simulator.copies import Copies
from infinite_llm.simulator.nonsense import hand_over_nonsense
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.simulator.watch import EPOCHS_PER_INCARNATION, Watch, World
from infinite_llm.types import InstanceId, RequestUid, Tier

_SWAP_COSTS = SwapCosts(
  block_bytes=1, link_bytes_per_s=1e9, recompute_tokens_per_s=1.0
)
"""Copies always pay, so that whatever fits is swapped."""

_BEHIND = Ceiling(group=NOTHING, is_behind=True)
_CEILINGS = (
  ANY,
  ANY,
  Ceiling(group=NOTHING),
  Ceiling(group=NOTHING, long=False),
)
"""Engines plan so between turns, and while others wait for a turn."""


class Instance:
  """One life of an instance, from its start to its crash.

  Attributes:
    number: Which instance.
    incarnation: Which of its lives.
    manager: Its rManager.
    batcher: Its requests.
    watch: Checks what it does.
    requests: Requests that it has taken, by uid.
    num_nonsense: Messages that it had to refuse.
  """

  def __init__(
    self,
    number: InstanceId,
    incarnation: int,
    world: World,
    emigrate: Callable[[Request, InstanceId], None],
  ):
    """Starts an instance without requests.

    Args:
      number: Which instance.
      incarnation: Rises with each start.
      world: What it shares with the others.
      emigrate: Takes requests that are to run elsewhere.
    """
    scenario = world.scenario
    self.number = number
    self.incarnation = incarnation
    self.requests: dict[RequestUid, Request] = {}
    self.num_nonsense = 0
    self._world = world
    self._faults = world.faults(number)
    self._emigrate = emigrate
    last_epoch = (incarnation - 1) * EPOCHS_PER_INCARNATION
    host = None
    if scenario.host_blocks:
      host = HostTier(
        pool=BlockPool(number, scenario.host_blocks, last_epoch, Tier.HOST),
        costs=_SWAP_COSTS,
        overflow=scenario.overflow,
      )
    self.manager = RManager(
      instance=number,
      num_instances=scenario.num_instances,
      pool=BlockPool(number, scenario.num_blocks, last_epoch),
      block_size=scenario.block_size,
      lending=scenario.lending,
      clock=world.network.clock(number),
      incarnation=incarnation,
      gmanagers=(GMANAGER, STANDBY),
      faults=self._faults,
      host=host,
    )
    self.batcher = Batcher(
      self.manager,
      scenario.scheduler,
      scenario.lending,
      scenario.block_size,
    )
    self.watch = Watch(self.manager, incarnation, world)
    self._moves: list[Move] = []
    self._ghosts: list[Move] = []
    self._copies = Copies(self.manager, world, self._wake, self.settle)
    self._is_exchange_due = False
    self._flights = collections.deque[tuple[tuple[Row, bool], ...]]()

  @property
  def num_spill_slots(self) -> int:
    """S, spill slots that it has in all."""
    return self._world.scenario.lending.spill_slots

  @property
  def is_up(self) -> bool:
    """Whether it lives."""
    return self.watch.is_up

  @property
  def has_flight(self) -> bool:
    """Whether a step is under way."""
    return bool(self._flights)

  @property
  def is_quiet(self) -> bool:
    """Whether no step, no payload and no copy is under way."""
    return not (self._flights or self._moves or self._ghosts or self._copies)

  @property
  def copied(self) -> frozenset[RequestUid]:
    """Requests with copies between tiers under way."""
    return self._copies.uids

  def start(self) -> None:
    """Begins to tick, some time soon."""
    tick_s = self._world.scenario.tick_s
    self._wake(tick_s * self._world.rng.random(), self._tick)

  def on_message(self, envelope: Envelope) -> None:
    """Takes a message."""
    if id(envelope) in self._world.nonsense:
      self.num_nonsense += 1
      hand_over_nonsense(self.manager, envelope)
      return
    self.watch.hand_over(envelope)
    self.settle()

  def settle(self) -> None:
    """Sends what the manager says, does what it wants, checks what it has."""
    world = self._world
    outgoing = self.manager.drain_messages()
    for envelope in outgoing:
      self.watch.check_outgoing(envelope)
      world.network.send(envelope)
      if len(outgoing) > 1:
        self._faults(Mishap.DEATH_WHILE_SENDING)
    for effect in self.manager.drain_effects():
      match effect:
        case MoveBlocks(moves=moves):
          self._moves += moves
          self._schedule_exchange()
        case GrantEpochs():
          world.plane.grant(self.number, effect)
        case SwapBlocks() | OverflowBlocks():
          self._copies.begin(effect)
        case MigrateRequest(uid=uid, dst=dst):
          self.batcher.abort(uid)
          self._emigrate(self.requests[uid], dst)
        case DropOverflow():
          pass  # Nobody reads there any more.
    self.watch.check_books()

  def add(self, request: Request) -> None:
    """Takes a request."""
    self.requests[request.uid] = request
    self.batcher.add(request)

  def abort(self, uid: RequestUid) -> None:
    """Ends a request at somebody's wish."""
    self.batcher.abort(uid)
    self.settle()

  def move(self, uid: RequestUid, num_blocks: int, dst: InstanceId) -> bool:
    """Moves rBlocks of a request elsewhere, at somebody's wish.

    Returns:
      Whether that was begun.
    """
    is_begun = self.manager.move_kvcache(uid, num_blocks, dst)
    self.watch.want_borrows()
    self.settle()
    return is_begun

  def stop(self) -> tuple[Request, ...]:
    """Crashes: all that it had is gone.

    Returns:
      Requests that it had not finished.
    """
    self.watch.is_up = False
    self._moves.clear()
    self._ghosts.clear()
    self._copies.clear()
    self._flights.clear()
    return self.batcher.running + self.batcher.waiting

  # What it does by itself.

  def _wake(self, delay_s: float, callback: Callable[[], None]) -> None:
    self._world.network.call_later(self.number, delay_s, callback)

  def _tick(self) -> None:
    self.watch.tick()
    self.settle()
    if not self._flights:
      self._verify()
      self._step(self._world.rng.choice(_CEILINGS))
    self._wake(self._world.scenario.tick_s, self._tick)

  def _verify(self) -> None:
    """Proves or refutes moved rBlocks, as `LendingGroup` does."""
    unverified = self.manager.unverified()
    if not unverified:
      return
    size = self._world.scenario.block_size
    for uid in unverified:
      num_tokens = self.requests[uid].num_computed_tokens // size * size
      pieces = self.watch.read(uid, num_tokens)
      if pieces is not None:
        self.watch.check_proof(uid, pieces, num_tokens)
        self.manager.on_verified(uid, True)
      else:
        self.watch.check_trust(uid)
        self.watch.refute(uid)
    self.settle()

  def _step(self, ceiling: Ceiling) -> None:
    """Plans a step and launches it; what it proved is known later."""
    if not self.batcher.has_work:
      return
    rows = self.batcher.plan(ceiling).rows
    self.watch.want_borrows()
    self._take_ended()
    if rows:
      self._world.num_behind += len(self._flights)
      self._flights.append(tuple([(row, self._compute(row)) for row in rows]))
      if len(self._flights) == 1:
        self._await_first()
    self.settle()

  def _await_first(self) -> None:
    """Sees to the first step under way, and to one behind it."""
    step_s = self._world.scenario.step_s
    self._wake(step_s, self._land)
    if self._world.scenario.scheduler.async_scheduling:
      self._wake(step_s * self._world.rng.random(), self._step_behind)

  def _step_behind(self) -> None:
    """Launches a step behind the one under way, as `StepPlanner` may."""
    if (
      len(self._flights) == 1
      and self.manager.num_free_slots == self.num_spill_slots
      and not self.batcher.is_held
    ):
      self._step(_BEHIND)

  def _compute(self, row: Row) -> bool:
    """Runs one row on the devices; whether its KV was proved."""
    world = self._world
    table = self.manager.table(row.uid)
    size = world.scenario.block_size
    start, end = row.start, row.end
    for logical_id in range(start // size, -(-end // size)):
      location = table.location(logical_id)
      if location.instance != self.number:
        raise ViolationError(
          f"A step of request {row.uid} on instance {self.number} writes to"
          f" rBlock {location.block_id} of instance {location.instance}."
        )
      self.watch.check_own(row.uid, location.block_id)
    world.plane.write_tags(table, start, end)
    pieces = self.watch.read(row.uid, end)
    world.num_steps += 1
    world.num_unproved += pieces is None
    if pieces is not None:
      self.watch.check_proof(row.uid, pieces, start)
    else:
      self.watch.check_trust(row.uid)
    world.plane.write_tokens(table, start, end, is_right=pieces is not None)
    return pieces is not None

  def _land(self) -> None:
    """Commits the rows that were proved, and only those."""
    for row, is_proved in self._flights.popleft():
      request = self.requests[row.uid]
      if (
        request.status is not RequestStatus.RUNNING
        or row.start != request.num_computed_tokens
      ):
        self.batcher.hold()  # It was aborted, or the row before not proved.
        continue
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
        elif self._world.rng.random() < self._world.scenario.stops_early:
          self.batcher.finish(row.uid, RequestStatus.FINISHED_STOPPED)
    self._take_ended()
    if self._flights:
      self._await_first()
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
    receiver = self._world.watches[move.dst_instance]
    if receiver.is_up and self._world.plane.exchange(move):
      receiver.check_payload(move)
