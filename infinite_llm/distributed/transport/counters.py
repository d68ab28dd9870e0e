"""What a transport between processes counts."""

import collections
import dataclasses
import threading

from infinite_llm.errors import MessageError, Refusal

_MAX_KNOWN_CONNECTIONS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportCounters:
  """What happened to messages so far.

  Attributes:
    waiting: Wait to be sent, at this moment.
    in_flight: Are being sent, at this moment: at most one to each process.
    sent: Taken by the peer's process.
    delivered: Handed to a handler here, without its refusing them.
    dropped: Made room for others in the queue of a peer.
    expired: Not taken by the peer within their deadline.
    broken_off: Lost with a connection; they may have arrived.
    refused_by_peer: Sent from here and refused there.
    malformed: Refused here as no message, or one that makes no sense.
    oversized: Refused here as longer than the limit.
    unversioned: Refused here as of another version, or of something else.
    unauthenticated: Refused here as not written by a member.
    misdirected: Refused here as not for this process or this kind of manager,
      or as from a stranger.
    overflowed: Refused here because too many waited for `deliver`.
    cut_short: Calls to here whose frame never came whole: longer than twice the
      limit, or the connection was lost.
    handshakes: TLS handshakes that were begun here.
    connections: Those after which anything was said. The others were refused
      for their certificate, which gRPC tells nobody, or are still silent.
    last_refusal: What was wrong with the last message refused here.
  """

  waiting: int
  in_flight: int
  sent: int
  delivered: int
  dropped: int
  expired: int
  broken_off: int
  refused_by_peer: int
  malformed: int
  oversized: int
  unversioned: int
  unauthenticated: int
  misdirected: int
  overflowed: int
  cut_short: int
  handshakes: int
  connections: int
  last_refusal: str | None

  @property
  def refused(self) -> int:
    """Messages that were refused here, for whatever reason."""
    return sum(getattr(self, refusal.value) for refusal in Refusal)


class Tally:
  """Counts, from any thread."""

  def __init__(self):
    self._lock = threading.Lock()
    self._counts: collections.Counter[str] = collections.Counter()
    self._refused: collections.Counter[Refusal] = collections.Counter()
    self._last_refusal: str | None = None
    self._connections: dict[str, None] = {}

  def count(self, what: str) -> None:
    """Adds one to a field of `TransportCounters`."""
    with self._lock:
      self._counts[what] += 1

  def refuse(self, error: MessageError) -> None:
    """Counts a message that was refused here."""
    with self._lock:
      self._refused[error.refusal] += 1
      self._last_refusal = str(error)

  def hear(self, connection: str) -> None:
    """Counts a connection when it is first heard of."""
    with self._lock:
      if connection in self._connections:
        return
      self._counts["connections"] += 1
      self._connections[connection] = None
      if len(self._connections) > _MAX_KNOWN_CONNECTIONS:
        del self._connections[next(iter(self._connections))]

  def snapshot(self, waiting: int, in_flight: int) -> TransportCounters:
    """The counts as they are now, beside what is under way."""
    with self._lock:
      return TransportCounters(
        waiting=waiting,
        in_flight=in_flight,
        sent=self._counts["sent"],
        delivered=self._counts["delivered"],
        dropped=self._counts["dropped"],
        expired=self._counts["expired"],
        broken_off=self._counts["broken_off"],
        refused_by_peer=self._counts["refused_by_peer"],
        malformed=self._refused[Refusal.MALFORMED],
        oversized=self._refused[Refusal.OVERSIZED],
        unversioned=self._refused[Refusal.UNVERSIONED],
        unauthenticated=self._refused[Refusal.UNAUTHENTICATED],
        misdirected=self._refused[Refusal.MISDIRECTED],
        overflowed=self._counts["overflowed"],
        cut_short=self._counts["cut_short"],
        handshakes=self._counts["handshakes"],
        connections=self._counts["connections"],
        last_refusal=self._last_refusal,
      )
