"""What managers need of a transport."""

from collections.abc import Callable
from typing import Protocol

from infinite_llm.scheduler.messages import Address, Envelope

type Handler = Callable[[Envelope], None]
"""Takes a message that has arrived."""


class Transport(Protocol):
  """Carries messages between managers.

  It may lose, repeat, delay and reorder them: the managers cope with that.
  """

  def register(self, address: Address, handler: Handler) -> None:
    """Has messages to an address handed to `handler` from now on."""
    ...

  def send(self, envelope: Envelope) -> None:
    """Takes a message to carry; it arrives later, or never."""
    ...

  def has_mail(self) -> bool:
    """Whether `deliver` has something to hand over."""
    ...

  def deliver(self) -> int:
    """Hands over what has arrived, on the calling thread.

    Managers are not locked: only here are their handlers called.

    Returns:
      How many messages there were.
    """
    ...
