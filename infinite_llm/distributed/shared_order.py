"""Agrees on headers among several processes: process 0 decides, one turn ahead.

A process says what it has for the turn after the one that it has just taken,
while that one still runs. Then the leader *calls* the next turn, and agrees on
it when all are ready: when none has a local step under way that takes longer
than a decode step. Until then nobody waits for it: the others go on with local
steps. The header has what anybody asked for, and if nobody is late it is there
before the turn can begin.
"""

import collections
import time
from collections.abc import Callable

from infinite_llm.config import EngineConfig
from infinite_llm.distributed.group_link import LeaderLink, MemberLink
from infinite_llm.distributed.group_messages import Ask, Call, Ready, Turn
from infinite_llm.distributed.step_header import GroupWork, StepHeader
from infinite_llm.errors import GroupError


class LeaderOrder:
  """The order of process 0."""

  is_shared = True

  def __init__(
    self,
    link: LeaderLink,
    patience_s: float,
    config: EngineConfig,
    num_processes: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Begins with turn 1.

    Args:
      link: To the members.
      patience_s: How long a turn's steps may take, and what some process must
        end before it begins one; longer is a fault.
      config: Sizes of the whole group.
      num_processes: This one and the members.
      clock: Monotonic seconds.
    """
    self.patience_s = patience_s
    self._config = config
    self._link = link
    self._num_processes = num_processes
    self._asked: dict[int, GroupWork] = {}
    self._clock = clock
    self._called = 0
    self._called_s = 0.0
    self._ready: set[int] = set()
    self._header: StepHeader | None = None
    self._newest = StepHeader(number=0, work=GroupWork(), is_shared=True)
    self.next_number = 1

  def ask(self, work: GroupWork) -> None:
    """Says what this process has for the next turn."""
    self._note(0, self.next_number, work)

  def on_ask(self, process: int, message: Ask) -> None:
    """Takes what a member has for a turn.

    Raises:
      GroupError: If no engine of the group has the programs for it.
    """
    _check_work(process, message.work, self._config)
    self._note(process, message.number, message.work)

  @property
  def is_called(self) -> bool:
    """Whether the next turn waits for processes that are not ready."""
    return self._called == self.next_number and self._header is None

  def ready(self) -> None:
    """Says that this process can begin the turn that is called."""
    self._note_ready(0, self.next_number)

  def on_ready(self, process: int, message: Ready) -> None:
    """Takes that a member can begin a turn."""
    self._note_ready(process, message.number)

  def next(self) -> StepHeader | None:
    """The next turn if it is agreed; the same one until it is taken.

    Raises:
      GroupError: If some process has not been ready for too long.
    """
    if self.is_called and self._clock() - self._called_s > self.patience_s:
      late = sorted({*range(self._num_processes)} - self._ready)
      raise GroupError(
        f"All processes must be ready for a turn within {self.patience_s:g} s;"
        f" process(es) {', '.join(map(str, late))} are not ready for turn"
        f" {self._called}."
      )
    return self._header

  def take(self, turn: StepHeader) -> None:
    """Notes that the programs of a turn are being launched."""
    self._header = None
    self.next_number = turn.number + 1

  def has_call(self) -> bool:
    """Whether members have said something."""
    return self._link.has_mail()

  def _note(self, process: int, number: int, work: GroupWork) -> None:
    newest = self._newest
    if not work or (
      number <= newest.number and newest.work | work == newest.work
    ):
      # Nothing, or it came with the turn that was agreed meanwhile.
      self._asked.pop(process, None)
    else:
      self._asked[process] = work
    if self._asked and self._header is None:
      self._call()

  def _call(self) -> None:
    if self._called < self.next_number:
      self._called = self.next_number
      self._called_s = self._clock()
      self._ready.clear()
      self._link.broadcast(Call(number=self.next_number))

  def _note_ready(self, process: int, number: int) -> None:
    if self.is_called and number == self._called:
      self._ready.add(process)
      if len(self._ready) == self._num_processes:
        self._agree()

  def _agree(self) -> None:
    """With what is asked for by now, if only with nothing any more."""
    work = GroupWork()
    for asked in self._asked.values():
      work |= asked
    self._asked.clear()
    self._header = self._newest = StepHeader(
      number=self.next_number, work=work, is_shared=True
    )
    self._link.broadcast(Turn(number=self.next_number, work=work))


class MemberOrder:
  """The order of any other process: it asks, and does as it is told."""

  is_shared = True

  def __init__(self, link: MemberLink, patience_s: float, config: EngineConfig):
    """Begins with turn 1.

    Args:
      link: To the leader.
      patience_s: How long a turn's steps may take; longer is a fault.
      config: Sizes of the whole group.
    """
    self.patience_s = patience_s
    self._config = config
    self._link = link
    self._said: Ask | None = None
    self._called = 0
    self._ready = 0
    self._headers: collections.deque[StepHeader] = collections.deque()
    self.next_number = 1

  def ask(self, work: GroupWork) -> None:
    """Says what this process has for the next turn, if that is news."""
    if not work and self._said is not None and not self._said.work:
      return  # Nothing, after nothing, is no news in any turn.
    message = Ask(number=self.next_number, work=work)
    if message != self._said:
      self._said = message
      self._link.send(message)

  @property
  def is_called(self) -> bool:
    """Whether the next turn waits for processes that are not ready."""
    return self._called == self.next_number and not self._headers

  def ready(self) -> None:
    """Says once that this process can begin the turn that is called."""
    if self.is_called and self._ready < self._called:
      self._ready = self._called
      self._link.send(Ready(number=self._called))

  def on_call(self, message: Call) -> None:
    """Takes that a turn waits for all to be ready."""
    self._called = message.number

  def on_turn(self, message: Turn) -> None:
    """Takes a header of the leader.

    Raises:
      GroupError: If no engine of the group has the programs for it.
    """
    _check_work(0, message.work, self._config)
    header = StepHeader(
      number=message.number, work=message.work, is_shared=True
    )
    self._headers.append(header)

  def next(self) -> StepHeader | None:
    """The next turn if it is agreed; the same one until it is taken."""
    return self._headers[0] if self._headers else None

  def take(self, turn: StepHeader) -> None:
    """Notes that the programs of a turn are being launched."""
    self._headers.popleft()
    self.next_number = turn.number + 1

  def has_call(self) -> bool:
    """Whether the leader has said something."""
    return self._link.has_mail()


def _check_work(process: int, work: GroupWork, config: EngineConfig) -> None:
  """Refuses programs that warm-up has not compiled.

  Raises:
    GroupError: If there is one, naming the process that sent it.
  """
  quotas = config.lending.exchange_buckets
  for shift, quota in work.exchange:
    if shift >= config.num_instances or quota not in quotas:
      raise GroupError(
        f"Process {process} sent what it must not: exchange must have shifts"
        f" in [1, {config.num_instances}) and quotas out of"
        f" {', '.join(map(str, quotas))}; got {work.exchange}."
      )
  for name, buckets in (
    ("prefill_tokens", config.lending.group_prefill_buckets),
    ("layered_tokens", config.layered_buckets),
  ):
    sizes, tokens = (0, *buckets), getattr(work, name)
    if tokens not in sizes:
      raise GroupError(
        f"Process {process} sent what it must not: {name} must be one of"
        f" {', '.join(map(str, sizes))}; got {tokens}."
      )
