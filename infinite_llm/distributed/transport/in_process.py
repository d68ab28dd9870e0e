"""Messages between managers of one process: a queue."""

import collections
from collections.abc import Callable, Iterable

from infinite_llm.distributed.transport.base import Handler
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.messages import Address, Envelope

_MAX_DELIVERIES = 100_000

type Interceptor = Callable[[Envelope], Iterable[Envelope]]
"""Turns a message that is sent into those that are to arrive."""


class InProcessTransport:
  """Delivers in the order of sending, when told to."""

  def __init__(self, interceptor: Interceptor | None = None):
    """Makes a transport without messages.

    Args:
      interceptor: Called with each message sent; what it returns is delivered
        instead. Tests lose messages with it (nothing), repeat them (the message
        twice) or delay them (the message of an earlier call). None delivers
        each message once.
    """
    self._interceptor = interceptor
    self._handlers: dict[Address, Handler] = {}
    self._queue: collections.deque[Envelope] = collections.deque()

  def register(self, address: Address, handler: Handler) -> None:
    """Has messages to an address handed to `handler` from now on."""
    self._handlers[address] = handler

  def send(self, envelope: Envelope) -> None:
    """Takes a message to carry.

    Raises:
      InvariantError: If nobody is registered at the receiver's address.
    """
    if envelope.receiver not in self._handlers:
      raise InvariantError(
        f"receiver must be registered; got {envelope.receiver!r}, registered"
        f" are {sorted(map(str, self._handlers))}."
      )
    if self._interceptor is None:
      self._queue.append(envelope)
    else:
      self._queue.extend(self._interceptor(envelope))

  def has_mail(self) -> bool:
    """Whether any message waits to be delivered."""
    return bool(self._queue)

  def deliver(self) -> int:
    """Hands over all messages, also those sent meanwhile.

    Returns:
      How many there were.

    Raises:
      InvariantError: If it does not come to an end.
    """
    delivered = 0
    while self._queue:
      if delivered == _MAX_DELIVERIES:
        raise InvariantError(
          f"Managers must come to rest; {delivered} messages in a row did not"
          " end."
        )
      envelope = self._queue.popleft()
      self._handlers[envelope.receiver](envelope)
      delivered += 1
    return delivered
