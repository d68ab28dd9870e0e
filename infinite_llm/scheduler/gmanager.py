"""The gManager: keeps the debt ledger and says who might lend."""

from collections.abc import Iterable

from infinite_llm.errors import MessageError, Refusal
from infinite_llm.scheduler.ledger import ClusterView, Ledger
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Address,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  Heartbeat,
)
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.types import InstanceId


class GManager:
  """One for a cluster. It only proposes: creditors decide for themselves.

  All it knows comes from heartbeats, so it may start anew at any time, and it
  answers a repeated question from what it knows by then.
  """

  def __init__(self, policy: str):
    """Makes a gManager that knows nobody yet.

    Args:
      policy: Name of the policy that ranks creditors.

    Raises:
      ConfigError: If there is no such policy.
    """
    self._policy = get_policy(policy)
    self._ledger = Ledger()
    self._outgoing: list[Envelope] = []

  def view(self) -> ClusterView:
    """The ledger as it is now."""
    return self._ledger.view()

  def on_message(self, envelope: Envelope) -> None:
    """Takes a message of an rManager.

    Raises:
      MessageError: If it is none for a gManager; nothing has changed then.
    """
    sender = envelope.sender
    if sender == GMANAGER:
      raise MessageError(
        Refusal.MISDIRECTED,
        f"sender must be an instance; got {sender!r}.",
      )
    match envelope.body:
      case Heartbeat() as heartbeat:
        is_new = self._ledger.record(
          sender, envelope.incarnation, envelope.seq, heartbeat
        )
        # A newcomer is news to everybody; else only the sender is told.
        lines = self.view().lines
        everybody = [line.instance for line in lines]
        self._send_status(envelope, everybody if is_new else [sender])
      case CandidatesRequest():
        instances = self._policy.rank_creditors(self.view(), sender)
        self._send(envelope, sender, Candidates(instances=instances))
      case body:
        raise MessageError(
          Refusal.MISDIRECTED,
          f"{type(body).__name__} of instance {sender} is not for the"
          " gManager.",
        )

  def drain_messages(self) -> list[Envelope]:
    """Takes the messages that are to be sent now."""
    outgoing, self._outgoing = self._outgoing, []
    return outgoing

  def _send_status(
    self, cause: Envelope, receivers: Iterable[InstanceId]
  ) -> None:
    lendable = tuple(
      (line.instance, line.lendable) for line in self.view().lines
    )
    for receiver in receivers:
      self._send(cause, receiver, ClusterStatus(lendable=lendable))

  def _send(
    self,
    cause: Envelope,
    receiver: Address,
    body: Candidates | ClusterStatus,
  ) -> None:
    self._outgoing.append(
      Envelope(
        sender=GMANAGER,
        receiver=receiver,
        incarnation=cause.incarnation,
        seq=cause.seq,
        body=body,
      )
    )
