"""Continuous batching of one instance: which rows its next step has."""

import collections
from collections.abc import Iterable, Mapping

from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.chunks import Chunks
from infinite_llm.scheduler.needs import Needs
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.scheduler.retries import failed, recomputed
from infinite_llm.scheduler.rmanager import Reconcile, RManager
from infinite_llm.scheduler.step_plan import (
  ANY,
  Ceiling,
  Draft,
  GroupRows,
  Row,
  StepPlan,
  next_group_rows,
)
from infinite_llm.types import PoolCounts, RequestUid


class Batcher:
  """Runs the requests of one instance, first come first served.

  A step is planned anew each time from how far each request is, or will be once
  the step under way is over; nothing is promised from one to the next. When
  rBlocks run short, the policy's victim lends its own out; if that is
  impossible, the youngest request that is younger than the one in need is
  preempted, so the oldest always gets through. A preempted request waits in
  HOST if there is room and copies are faster; otherwise its KV is computed
  anew.

  Attributes:
    is_held: Whether the next plan must wait until nothing is under way.
  """

  def __init__(
    self,
    rmanager: RManager,
    scheduler: SchedulerConfig,
    lending: LendingConfig,
    block_size: int,
  ):
    """Makes a batcher without requests.

    Args:
      rmanager: The instance's manager.
      scheduler: Sizes of a step.
      lending: Sizes of group prefill steps.
      block_size: P, tokens per rBlock.
    """
    self._rmanager = rmanager
    self._scheduler = scheduler
    self._most_attempts = scheduler.max_row_attempts
    self._block_size = block_size
    self._needs = Needs(rmanager, block_size)
    self._chunks = Chunks(rmanager, scheduler, lending, block_size)
    self._waiting: collections.deque[Request] = collections.deque()
    self._running: dict[RequestUid, Request] = {}
    self._ended: collections.deque[Request] = collections.deque()
    self.is_held = False

  @property
  def waiting(self) -> tuple[Request, ...]:
    """Requests without rBlocks in HBM, next one first."""
    return tuple(self._waiting)

  @property
  def running(self) -> tuple[Request, ...]:
    """Requests with rBlocks, by arrival."""
    return tuple(sorted(self._running.values(), key=lambda r: r.arrival))

  @property
  def has_work(self) -> bool:
    """Whether any request has not ended."""
    return bool(self._waiting or self._running)

  def hold(self) -> None:
    """Has the next plan wait: rows under way may not give what is foreseen."""
    self.is_held = True

  def pool_counts(self) -> PoolCounts:
    """How the instance's rBlocks are used."""
    return self._rmanager.counts()

  def add(self, request: Request) -> None:
    """Takes a request; it waits behind those that came before."""
    request.status = RequestStatus.WAITING
    self._waiting.append(request)

  def abort(self, uid: RequestUid) -> None:
    """Ends a request at the caller's wish."""
    self._end(uid, RequestStatus.FINISHED_ABORTED)

  def finish(self, uid: RequestUid, status: RequestStatus) -> None:
    """Ends a request that has all its tokens, with a finished status."""
    if not status.is_finished:
      raise InvariantError(f"status must be a finished one; got {status}.")
    self._end(uid, status)

  def fail(self, uid: RequestUid, error: Exception) -> None:
    """Ends a request that cannot go on, and says why."""
    self._end(uid, RequestStatus.FAILED, error)

  def take_ended(self) -> Request | None:
    """Hands out each request that ended, once and in order; None at last."""
    return self._ended.popleft() if self._ended else None

  def preempt(self, uid: RequestUid) -> None:
    """Gives up a running request's KV; it waits as its arrival says."""
    self._rmanager.close(uid)
    self._await_admission(uid)

  def set_aside(self, uid: RequestUid) -> None:
    """Has a running request wait: in HOST if it can and copies are faster."""
    swapping = self._rmanager.swapping
    if swapping.is_preferred(uid) and swapping.swap_out(uid):
      self._await_admission(uid)
    else:
      self.preempt(uid)

  def _await_admission(self, uid: RequestUid) -> None:
    self.hold()
    request = self._running.pop(uid)
    request.begin_at(0)
    request.status = RequestStatus.WAITING
    ahead = sum(other.arrival < request.arrival for other in self._waiting)
    self._waiting.insert(ahead, request)
    self._note_demand()

  def group_work(self, under_way: Mapping[RequestUid, Row]) -> GroupRows:
    """What requests have for the group steps after those under way."""
    spilled = [
      request
      for uid, request in self._running.items()
      if self._rmanager.spill(uid) is not None
      and self._rmanager.is_readable(uid)
      and not self._chunks.awaits_room(request, under_way.get(uid))
    ]
    layered, most = self._rmanager.overflow.attended, self._chunks.group_tokens
    return next_group_rows(spilled, layered, under_way, most)

  def plan(self, ceiling: Ceiling = ANY) -> StepPlan:
    """Chooses the rows of the next step and allocates what they write to.

    Args:
      ceiling: Which rows there may be. Behind a step under way, its rows are
        taken for done, and a plan is empty where a request needs more than
        free rBlocks of its own instance: then `is_held`.
    """
    if not ceiling.is_behind:
      self.is_held = False
      for request in self._running.values():
        request.begin_at(request.num_computed_tokens)
      self._recompute_lost()
    elif self._rmanager.lost():
      self.hold()
    self._admit(is_behind=ceiling.is_behind)
    draft = Draft(ceiling=ceiling)
    # By arrival, and only younger ones are preempted: what is in the draft
    # stays running.
    for request in self.running:
      # One that ends with its token under way needs no row more.
      is_last = request.num_coming_tokens == request.max_total_tokens
      if request.uid in self._running and not (ceiling.is_behind and is_last):
        self._add_row(request, draft)
      if ceiling.is_behind and self.is_held:
        return StepPlan()
    self._note_demand()
    plan = draft.plan()
    for row in plan.rows:
      self._running[row.uid].num_launched_tokens = row.end
    return plan

  def advance(self, row: Row) -> None:
    """Commits a row whose step was proved; its sampled token comes after."""
    request = self._running[row.uid]
    request.num_computed_tokens = row.end
    if row.end > request.furthest_tokens:
      request.furthest_tokens = row.end
      request.attempts = 0
    self._rmanager.confirm(row.uid, row.end)

  def row_failed(self, row: Row) -> None:
    """Reacts to a row whose step was not proved: it did not happen."""
    self.hold()
    request = self._running[row.uid]
    error = failed(request, self._rmanager.instance, self._most_attempts)
    if (
      not self._is_given_up(request, error)
      and self._rmanager.reconcile(row.uid) is Reconcile.RECOMPUTE
    ):
      self._recompute(request)

  def _end(
    self,
    uid: RequestUid,
    status: RequestStatus,
    error: Exception | None = None,
  ) -> None:
    request = self._running.pop(uid, None)
    if request is not None:
      self._rmanager.close(uid)
    else:
      request = self._take_waiting(uid)
      self._rmanager.swapping.drop(uid)
    request.status = status
    request.error = error
    self._ended.append(request)
    self._note_demand()  # Where nothing is left to plan, nobody else would.

  def _take_waiting(self, uid: RequestUid) -> Request:
    for request in self._waiting:
      if request.uid == uid:
        self._waiting.remove(request)
        return request
    raise InvariantError(
      f"Request {uid} is not on instance {self._rmanager.instance}."
    )

  def _recompute_lost(self) -> None:
    for uid in self._rmanager.lost():
      request = self._running[uid]
      error = failed(request, self._rmanager.instance, self._most_attempts)
      if not self._is_given_up(request, error):
        self._recompute(request)

  def _is_given_up(self, request: Request, error: Exception | None) -> bool:
    """Ends a request if there is an error; whether there is."""
    if error is not None:
      self.fail(request.uid, error)
    return error is not None

  def _recompute(self, request: Request) -> None:
    """Has KV computed anew that cannot be proved, but not again and again."""
    error = recomputed(request, self._rmanager.instance, self._most_attempts)
    if not self._is_given_up(request, error):
      self.preempt(request.uid)

  def _admit(self, *, is_behind: bool = False) -> None:
    """Lets requests in from the head of the queue while they fit."""
    if not self._waiting or self._rmanager.is_frozen:
      return
    room = self._rmanager.pool.num_free - self._needs.promised(self._running)
    overflow = self._rmanager.overflow
    while len(self._running) < self._scheduler.max_num_seqs:
      # Only those that wait for another one's place in HOST are overtaken.
      ready = (r for r in self._waiting if overflow.may_enter(r.num_tokens))
      request = next(ready, None)
      if request is None or request.stands_aside:
        return
      needed = overflow.needed_blocks(request.num_tokens)
      is_allotted = self._rmanager.allotted_to == request.arrival
      elsewhere = self._rmanager.lendable_elsewhere() if is_allotted else 0
      if needed > room + elsewhere or not self._enter(request, is_behind):
        return
      room -= needed
      self._waiting.remove(request)
      request.status = RequestStatus.RUNNING
      self._running[request.uid] = request

  def _enter(self, request: Request, is_behind: bool) -> bool:
    """Opens a request that fits; whether it can come now."""
    swapping, overflow = self._rmanager.swapping, self._rmanager.overflow
    is_beyond = overflow.is_beyond(request.num_tokens)
    if is_beyond and is_behind:
      self.hold()
      return False
    if is_beyond:  # It could not come back as a whole.
      swapping.drop(request.uid)
    if swapping.stage(request.uid) is None:
      request.begin_at(0)
      self._rmanager.open(request.uid)
      return not is_beyond or overflow.enter(request.uid)
    # Its copies take rBlocks of this instance at once, before the older ones.
    lacking = self._needs.lacking(self._running)
    num_tokens = swapping.swap_in(request.uid, spare=lacking)
    if num_tokens is None:
      return False
    request.begin_at(num_tokens)
    return True

  def _note_demand(self) -> None:
    demand = self._needs.demand(self._waiting, self._running)
    self._rmanager.condition.note_demand(demand)

  def _add_row(self, request: Request, draft: Draft) -> None:
    # Hundreds of times a step, nearly always this: one more token at home.
    uid, end = request.uid, request.num_coming_tokens
    if request.num_launched_tokens == end - 1 and (
      end <= self._rmanager.resident_blocks(uid) * self._block_size
    ):
      row = Row(uid=uid, start=end - 1, num_tokens=1, samples=True)
      draft.local_decode.append(row)
      return
    if not self._rmanager.is_readable(uid):
      return
    is_group = self._rmanager.spill(uid) is not None
    is_layered = self._rmanager.table(uid).num_host > 0
    if draft.ceiling.is_behind and (is_group or is_layered):
      self.hold()
      return
    num_tokens = self._chunks.wanted(
      request, draft, is_group=is_group, is_layered=is_layered
    )
    if num_tokens > 0:
      is_behind = draft.ceiling.is_behind
      num_tokens = self._make_room(request, num_tokens, is_behind=is_behind)
    if is_group and is_layered:  # Its turn is asked for once there is room.
      num_tokens = min(num_tokens, draft.ceiling.group.layered_tokens)
    if num_tokens > 0:
      row = Row(
        uid=uid,
        start=request.num_launched_tokens,
        num_tokens=num_tokens,
        samples=num_tokens == request.num_unlaunched,
      )
      draft.add(row, is_group=is_group, is_layered=is_layered)

  def _make_room(
    self, request: Request, num_tokens: int, *, is_behind: bool = False
  ) -> int:
    """Allocates rBlocks for a request's next tokens; how many it may compute.

    Fewer if only some rBlocks are to be had, none if room is being made.
    """
    start = request.num_launched_tokens
    if self._rmanager.is_frozen:  # Preempting others would give it nothing.
      room = self._needs.capacity_tokens(request) - start
      return max(min(num_tokens, room), 0)
    while True:
      missing = self._needs.missing(request, start + num_tokens)
      if not missing or self._rmanager.allocate(request.uid, missing):
        return num_tokens
      if is_behind:
        self.hold()
        return 0
      if self._relocate(request, missing):
        return 0
      allowed = self._rmanager.overflow.room(request.uid, missing)
      some = min(self._rmanager.pool.num_free, allowed)
      if some > 0:
        self._rmanager.allocate(request.uid, some)
      room = self._needs.capacity_tokens(request) - start
      if room > 0:  # Also what a step that failed has left.
        return min(room, num_tokens)
      if not (allowed and self._preempt_younger_than(request)):
        return 0

  def _relocate(self, request: Request, missing: int) -> bool:
    """Whether HBM is about to become free: elsewhere, or in HOST, is room."""
    overflow, uid = self._rmanager.overflow, request.uid
    if not overflow.takes(uid, request.num_tokens):
      promised = self._needs.promised(self._running)
      return self._borrow(missing, promised, self._running)
    if not overflow.enter(uid):
      return True  # Once what is under way with it is over.
    coming = self._needs.missing(request, request.num_tokens)
    if self._borrow(missing, coming, (uid,)):
      return True
    self._free_host()
    return overflow.begin()

  def _free_host(self) -> None:
    """Has preempted requests give HOST up to the one that overflows."""
    for request in reversed(self._waiting):
      if not self._rmanager.overflow.lacks_host:
        return
      self._rmanager.swapping.drop(request.uid)

  def _borrow(
    self, missing: int, coming: int, victims: Iterable[RequestUid]
  ) -> bool:
    """Whether local rBlocks are about to become free, elsewhere is room.

    Args:
      missing: rBlocks that are needed now.
      coming: Those that will be, for prompts.
      victims: Requests of which one may have to move some of its own away.
    """
    if self._rmanager.is_borrowing():
      return True
    victim = self._rmanager.choose_victim(victims)
    wanted = self._chunks.borrow(missing, coming)
    return victim is not None and self._rmanager.borrow(victim, wanted)

  def _preempt_younger_than(self, request: Request) -> bool:
    uid = max(self._running.values(), key=lambda r: r.arrival).uid
    if uid == request.uid or self._rmanager.swapping.is_making_room:
      return False
    if uid == self._rmanager.overflow.uid:
      self._free_host()
    if self._rmanager.overflow.gives_way(uid):
      return False
    self.set_aside(uid)
    return True
