"""Requests that survive loss and repetition: sent until answered, done once."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from infinite_llm.errors import MessageError, Refusal
from infinite_llm.scheduler.messages import (
  ANSWER_TO,
  GMANAGER,
  Address,
  Body,
  Envelope,
  GManagerAddress,
  Reply,
  Request,
)


@dataclasses.dataclass(kw_only=True)
class Pending[Context]:
  """A request that has no answer yet.

  Attributes:
    receiver: Who is to answer.
    body: What was asked.
    context: What the asker needs to go on.
    sent_s: When it was last sent.
  """

  receiver: Address
  body: Request
  context: Context
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
    """
    self._sender: Address = sender
    self._incarnation = incarnation
    self._clock = clock
    self._resend_after_s = resend_after_s
    self._last_seq = 0
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
    pending = Pending(
      receiver=receiver, body=body, context=context, sent_s=self._clock()
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
    now = self._clock()
    for seq, pending in self._pending.items():
      if pending.receiver == GMANAGER:
        pending.sent_s = now
        self._send(seq, self._route(GMANAGER), pending.body)

  def reply(self, request: Envelope, body: Reply) -> None:
    """Answers a request."""
    answer = Envelope(
      sender=self._sender,
      receiver=request.sender,
      incarnation=request.incarnation,
      seq=request.seq,
      body=body,
    )
    self._outgoing.append(answer)

  def take_answered(self, reply: Envelope) -> Pending[Context] | None:
    """Finds the request that an answer belongs to, and ends it.

    Args:
      reply: An answer.

    Returns:
      The request; None if it was answered or given up before.

    Raises:
      MessageError: If it is an answer to something else than was asked.
    """
    pending = self._pending.get(reply.seq)
    if (
      reply.incarnation != self._incarnation
      or pending is None
      or self._route(pending.receiver) != reply.sender
    ):
      return None
    wanted = ANSWER_TO[type(pending.body)]
    if type(reply.body) is not wanted:
      raise MessageError(
        Refusal.MISDIRECTED,
        f"The answer to request {reply.seq} must be a {wanted.__name__}; got"
        f" {type(reply.body).__name__}.",
      )
    return self._pending.pop(reply.seq)

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

  def resend(self) -> None:
    """Sends those requests again that waited too long."""
    now = self._clock()
    for seq, pending in self._pending.items():
      if now - pending.sent_s >= self._resend_after_s:
        pending.sent_s = now
        self._send(seq, self._route(pending.receiver), pending.body)

  def drain(self) -> list[Envelope]:
    """Takes the messages that are to be sent now."""
    outgoing, self._outgoing = self._outgoing, []
    return outgoing

  def _route(self, receiver: Address) -> Address:
    return self._leader if receiver == GMANAGER else receiver

  def _send(self, seq: int, receiver: Address, body: Body) -> None:
    awaited = (
      n
      for n, pending in self._pending.items()
      if self._route(pending.receiver) == receiver
    )
    envelope = Envelope(
      sender=self._sender,
      receiver=receiver,
      incarnation=self._incarnation,
      seq=seq,
      body=body,
      settled=min(awaited, default=seq),
    )
    self._outgoing.append(envelope)


@dataclasses.dataclass(kw_only=True)
class _Heard:
  """What a receiver remembers of one sender."""

  incarnation: int = 0
  settled: int = 0
  replies: dict[int, Reply] = dataclasses.field(
    default_factory=dict[int, Reply]
  )


class Inbox:
  """Answers to requests, so that none is executed twice.

  An answer is kept until the sender says that it needs it no more; a request
  older than that is a late repetition and is dropped.
  """

  def __init__(self):
    self._heard: collections.defaultdict[Address, _Heard] = (
      collections.defaultdict(_Heard)
    )

  def answer(
    self, request: Envelope, execute: Callable[[], Reply]
  ) -> Reply | None:
    """Executes a request, unless that was done before.

    Args:
      request: The request.
      execute: Does what it asks.

    Returns:
      The answer, the same for every repetition; None if nobody awaits one.
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
    if request.seq not in heard.replies:
      heard.replies[request.seq] = execute()
    return heard.replies[request.seq]
