"""Requests that survive loss and repetition: sent until answered, done once."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from infinite_llm.rules import require
from infinite_llm.scheduler.fault_points import Place, no_fault
from infinite_llm.scheduler.lease_messages import (
  Introduction,
  Renewed,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Address,
  Body,
  Envelope,
  GManagerAddress,
  Reply,
  Request,
)
from infinite_llm.types import FaultPoint


@dataclasses.dataclass(kw_only=True)
class Pending[Context]:
  """A request that has no answer yet.

  Attributes:
    receiver: Who is to answer.
    body: What was asked.
    context: What the asker needs to go on.
    first_s: When it was first sent.
    sent_s: When it was last sent.
  """

  receiver: Address
  body: Request
  context: Context
  first_s: float
  sent_s: float


class Outbox[Context]:
  """Messages that one manager sends."""

  def __init__(
    self,
    sender: Address,
    incarnation: int,
    clock: Callable[[], float],
    resend_after_s: float,
  ):
    """Makes an empty outbox.

    Args:
      sender: Whose it is.
      incarnation: The sender's; rises each time it starts anew.
      clock: Monotonic seconds.
      resend_after_s: Seconds without an answer before a request is sent again.

    Raises:
      ConfigError: If the incarnation is one that nobody would listen to.
    """
    require(incarnation >= 1, "incarnation", "at least 1", incarnation)
    self._sender: Address = sender
    self._incarnation = incarnation
    self._clock = clock
    self._resend_after_s = resend_after_s
    self._last_seq = 0
    self._incarnation_of: dict[Address, int] = {}
    self._leader: GManagerAddress = GMANAGER
    self._pending: dict[int, Pending[Context]] = {}
    self._outgoing: list[Envelope] = []

  def ask(self, receiver: Address, body: Request, context: Context) -> None:
    """Sends a request, again and again until it is answered.

    Args:
      receiver: Who is to answer; `GMANAGER` is whichever gManager leads.
      body: What is asked.
      context: Given back with the answer.
    """
    self._last_seq += 1
    now = self._clock()
    pending = Pending(
      receiver=receiver, body=body, context=context, first_s=now, sent_s=now
    )
    self._pending[self._last_seq] = pending
    self._send(self._last_seq, self._route(receiver), body)

  def tell(self, receiver: Address, body: Body) -> None:
    """Sends a message once and awaits nothing."""
    self.tell_all((receiver,), body)

  def tell_all(self, receivers: Sequence[Address], body: Body) -> int:
    """Sends a message once to each receiver and awaits nothing.

    Returns:
      Its number, the same for all.
    """
    self._last_seq += 1
    for receiver in receivers:
      self._send(self._last_seq, receiver, body)
    return self._last_seq

  def ask_leader(self, leader: GManagerAddress) -> None:
    """Asks another gManager from now on, also what has no answer yet."""
    self._leader = leader
    for seq, pending in self._pending.items():
      if pending.receiver == GMANAGER:
        self._resend_one(seq, pending)

  def reply(
    self, request: Envelope, body: Reply | Renewed | Introduction
  ) -> None:
    """Answers a request."""
    answer = Envelope(
      sender=self._sender,
      receiver=request.sender,
      incarnation=request.incarnation,
      seq=request.seq,
      body=body,
      responder=self._incarnation,
    )
    self._outgoing.append(answer)

  def find(self, reply: Envelope) -> Pending[Context] | None:
    """Finds the request that an answer belongs to.

    Args:
      reply: An answer.

    Returns:
      The request; None if it was answered or given up before.
    """
    pending = self._pending.get(reply.seq)
    if (
      reply.incarnation != self._incarnation
      or pending is None
      or self._route(pending.receiver) != reply.sender
    ):
      return None
    return pending

  def end(self, seq: int) -> None:
    """Notes that a request has its answer."""
    del self._pending[seq]

  def give_up(self, unwanted: Callable[[Pending[Context]], bool]) -> None:
    """Stops asking; answers that come all the same are ignored."""
    self._pending = {
      seq: pending
      for seq, pending in self._pending.items()
      if not unwanted(pending)
    }

  def awaits(self, context: Context) -> bool:
    """Whether a request of this context has no answer yet."""
    return any(p.context is context for p in self._pending.values())

  def introduce(self, receiver: Address, incarnation: int) -> None:
    """Means messages for this incarnation of a receiver from now on.

    What it has not answered is asked again: it executes nothing that was meant
    for another.
    """
    self._incarnation_of[receiver] = incarnation
    for seq, pending in self._pending.items():
      if pending.receiver == receiver:
        self._resend_one(seq, pending)

  def resend(self) -> None:
    """Sends those requests again that waited too long."""
    now = self._clock()
    for seq, pending in self._pending.items():
      if now - pending.sent_s >= self._resend_after_s:
        self._resend_one(seq, pending)

  def drain(self) -> list[Envelope]:
    """Takes the messages that are to be sent now."""
    outgoing, self._outgoing = self._outgoing, []
    return outgoing

  def _resend_one(self, seq: int, pending: Pending[Context]) -> None:
    pending.sent_s = self._clock()
    self._send(seq, self._route(pending.receiver), pending.body)

  def _route(self, receiver: Address) -> Address:
    return self._leader if receiver == GMANAGER else receiver

  def _send(self, seq: int, receiver: Address, body: Body) -> None:
    settled = seq
    for number, pending in self._pending.items():  # By rising number.
      if self._route(pending.receiver) == receiver:
        settled = min(settled, number)
        break
    envelope = Envelope(
      sender=self._sender,
      receiver=receiver,
      incarnation=self._incarnation,
      seq=seq,
      body=body,
      settled=settled,
      meant_for=self._incarnation_of.get(receiver, 0),
    )
    self._outgoing.append(envelope)


@dataclasses.dataclass(kw_only=True)
class _Heard:
  """What a receiver remembers of one sender."""

  incarnation: int = 0
  settled: int = 0
  replies: dict[int, Reply | None] = dataclasses.field(
    default_factory=dict[int, Reply | None]
  )


class Inbox:
  """Answers to requests, so that none is executed twice.

  An answer is kept until the sender says that it needs it no more; a request
  older than that is a late repetition and is dropped.
  """

  def __init__(self, faults: FaultPoint = no_fault):
    """Makes an inbox that has heard of nobody.

    Args:
      faults: What goes wrong.
    """
    self._faults = faults
    self._heard: collections.defaultdict[Address, _Heard] = (
      collections.defaultdict(_Heard)
    )

  def answer(
    self, request: Envelope, execute: Callable[[], Reply | None]
  ) -> Reply | None:
    """Executes a request, unless that was done before.

    Args:
      request: The request.
      execute: Does what it asks; None if the answer comes `later`.

    Returns:
      The answer, the same for every repetition; None if nobody awaits one, or
      it is still to come.
    """
    heard = self._heard[request.sender]
    if request.incarnation > heard.incarnation:
      heard = _Heard(incarnation=request.incarnation)
      self._heard[request.sender] = heard
    if request.incarnation < heard.incarnation or request.seq < heard.settled:
      return None
    if request.settled > heard.settled:
      heard.settled = request.settled
      heard.replies = {
        seq: reply
        for seq, reply in heard.replies.items()
        if seq >= request.settled
      }
    is_new = request.seq not in heard.replies
    if is_new or self._faults(Place.REPETITION_EXECUTED):
      heard.replies[request.seq] = execute()
    return heard.replies[request.seq]

  def later(self, request: Envelope, reply: Reply) -> bool:
    """Keeps the answer to a request that took some time.

    Args:
      request: A request that was executed without an answer.
      reply: Its answer.

    Returns:
      Whether the sender may still await it.
    """
    heard = self._heard[request.sender]
    is_awaited = (
      request.incarnation == heard.incarnation and request.seq in heard.replies
    )
    if is_awaited:
      heard.replies[request.seq] = reply
    return is_awaited
