"""What an rManager does with a message before anybody acts on it."""

import collections
from collections.abc import Callable

from absl import logging

from infinite_llm.scheduler.account import Account
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.effects import Move
from infinite_llm.scheduler.fault_points import Mishap, Place
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchReply,
  Grant,
  Introduction,
  LeaseRequest,
  Release,
  ReleaseReply,
  Renew,
  Renewed,
  Reserve,
  ReserveReply,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.mailbox import Inbox, Outbox
from infinite_llm.scheduler.messages import (
  Candidates,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  MoveKvcache,
  Plan,
  RecallKvcache,
  Reply,
)
from infinite_llm.scheduler.reporter import Reporter
from infinite_llm.scheduler.screening import (
  Group,
  fault_in,
  fault_in_answer,
)
from infinite_llm.types import FaultPoint, InstanceId

type Guidance = ClusterStatus | FullHeartbeatRequest | Plan

_LOG_EVERY_S = 10


class Reception:
  """Refuses nonsense and the dead, introduces strangers, executes once.

  A message of a later incarnation than was known means that the sender began
  anew: what it had lent or borrowed is gone. One of an earlier incarnation
  changes nothing any more.

  Attributes:
    refused: Messages that no sane sender would send, by the name of their kind.
  """

  def __init__(
    self,
    group: Group,
    incarnation: int,
    clock: Callable[[], float],
    creditor: Creditor,
    debtor: Debtor,
    outbox: Outbox[Account],
    reporter: Reporter,
    faults: FaultPoint,
  ):
    """Makes the reception of one instance.

    Args:
      group: Who may say what to it.
      incarnation: Its own.
      clock: Monotonic seconds.
      creditor: Takes requests for leases.
      debtor: Takes answers.
      outbox: Takes messages.
      reporter: Knows which gManager leads.
      faults: What goes wrong.
    """
    self._faults = faults
    self.refused: collections.Counter[str] = collections.Counter()
    self._group = group
    self._incarnation = incarnation
    self._clock = clock
    self._creditor = creditor
    self._debtor = debtor
    self._inbox = Inbox(faults)
    self._outbox = outbox
    self._reporter = reporter
    self._incarnation_of: dict[InstanceId, int] = {}

  def on_message(self, envelope: Envelope) -> Guidance | None:
    """Takes a message.

    Returns:
      What the leading gManager has to say, if that is what it was.
    """
    fault = fault_in(envelope, self._group, self._reporter.leader_epoch)
    if fault is not None:
      self._refuse(envelope, fault)
    elif not isinstance(envelope.sender, int):
      return self._on_gmanager(envelope)
    elif self._hear(envelope.sender, envelope):
      self._on_instance(envelope.sender, envelope)
    return None

  def on_exchanged(self, moves: tuple[Move, ...]) -> None:
    """Notes that payloads of this instance were sent."""
    self._debtor.on_exchanged(moves)
    for request, reply in self._creditor.on_exchanged(moves):
      if self._inbox.later(request, reply):
        self._outbox.reply(request, reply)

  def _on_gmanager(self, envelope: Envelope) -> Guidance | None:
    if not self._reporter.follow(envelope):
      return None
    match envelope.body:
      case Candidates() as reply:
        self._on_reply(envelope, reply)
      case (
        ClusterStatus()
        | FullHeartbeatRequest()
        | MoveKvcache()
        | RecallKvcache() as guidance
      ):
        return guidance
      case _:
        pass
    return None

  def _hear(self, sender: InstanceId, envelope: Envelope) -> bool:
    """Notes that the sender lives; whether this incarnation of it does."""
    incarnation = envelope.responder or envelope.incarnation
    known = self._incarnation_of.get(sender, 0)
    if incarnation < known:
      return self._faults(Place.DEAD_HEARD)
    if incarnation > known:
      self._incarnation_of[sender] = incarnation
      if not self._faults(Place.DEAD_DEBTS_KEPT):
        self._creditor.end_leases_of(sender)
      if not self._faults(Place.RESTART_OVERLOOKED):
        self._debtor.on_restarted(sender)
      self._outbox.introduce(sender, incarnation)
    self._creditor.hear(sender)
    return True

  def _on_instance(self, sender: InstanceId, envelope: Envelope) -> None:
    match envelope.body:
      case Reserve() | Commit() | Release() | Sync() | Fetch() | Renew() if (
        not self._is_meant(envelope)
      ):
        self._outbox.reply(envelope, Introduction())
      case Reserve() | Commit() | Release() | Sync() | Fetch() as request:
        self._on_lease_request(sender, envelope, request)
      case Renew(sent_s=sent_s):
        self._outbox.reply(envelope, Renewed(sent_s=sent_s))
      case (
        ReserveReply()
        | CommitReply()
        | ReleaseReply()
        | SyncReply()
        | FetchReply() as reply
      ):
        self._on_reply(envelope, reply)
      case Renewed(sent_s=sent_s):
        self._on_renewed(sender, envelope, sent_s)
      case _:
        pass  # An introduction has said all by its envelope.

  def _is_meant(self, envelope: Envelope) -> bool:
    return envelope.meant_for == self._incarnation or self._faults(
      Place.MISDIRECTED_EXECUTED
    )

  def _on_lease_request(
    self, owner: InstanceId, envelope: Envelope, request: LeaseRequest
  ) -> None:
    fault = self._creditor.fault_in_grants(owner, _grants_named_by(request))
    if fault is not None:
      self._refuse(envelope, fault)
      return
    reply = self._inbox.answer(
      envelope, lambda: self._creditor.execute(owner, envelope, request)
    )
    self._faults(Mishap.DEATH_BEFORE_ANSWER)
    if reply is not None:
      self._outbox.reply(envelope, reply)

  def _on_reply(self, envelope: Envelope, reply: Reply) -> None:
    pending = self._outbox.find(envelope)
    if pending is None:
      return  # Answered before, or not awaited any more.
    fault = fault_in_answer(pending.body, reply)
    creditor = envelope.sender
    if isinstance(reply, ReserveReply) and isinstance(creditor, int):
      # It may grant an rBlock once more, but under another epoch.
      is_repeated = self._debtor.has_any(creditor, reply.grants)
      fault = "it grants a lease twice." if is_repeated else fault
    if fault is not None:
      self._refuse(envelope, fault)
      return
    self._outbox.end(envelope.seq)
    self._debtor.on_reply(pending, reply)

  def _on_renewed(
    self, creditor: InstanceId, envelope: Envelope, sent_s: float
  ) -> None:
    if envelope.incarnation != self._incarnation:
      return  # That time is of another clock.
    now = self._clock()
    if sent_s <= now:
      self._debtor.on_acknowledged(creditor, sent_s)
    else:
      self._refuse(envelope, f"sent_s must be at most {now}; got {sent_s}.")

  def _refuse(self, envelope: Envelope, fault: str) -> None:
    kind = type(envelope.body).__name__
    self.refused[kind] += 1
    logging.log_every_n_seconds(
      logging.WARNING,
      "Instance %s refused a %s from %s: %s",
      _LOG_EVERY_S,
      self._group.instance,
      kind,
      envelope.sender,
      fault,
    )


def _grants_named_by(request: LeaseRequest) -> list[Grant]:
  match request:
    case Commit(entries=entries) | Sync(entries=entries):
      return [entry.grant for entry in entries]
    case Fetch(entries=fetched):
      return [entry.grant for entry in fetched]
    case Release(grants=grants):
      return list(grants)
    case Reserve():
      return []
