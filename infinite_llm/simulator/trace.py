"""Histories of a simulation, and how to tell them apart."""

import hashlib
from collections.abc import Callable

from infinite_llm.scheduler.messages import Address, Envelope

type Observer = Callable[[float, str, Envelope | Address], None]
"""Hears of events: when, what (a `Fault`'s value or another word), of whom."""


class TraceHash:
  """An observer that tells two histories apart."""

  def __init__(self):
    self._hash = hashlib.sha256()

  def __call__(
    self, now_s: float, event: str, subject: Envelope | Address
  ) -> None:
    """Adds an event."""
    whom = str(subject)
    if isinstance(subject, Envelope):
      body = type(subject.body).__name__
      way = f"{subject.sender}>{subject.receiver}"
      whom = f"{way} {subject.incarnation}.{subject.seq} {body}"
    # Every bit of the time counts.
    self._hash.update(f"{now_s.hex()} {event} {whom}\n".encode())

  def hexdigest(self) -> str:
    """Stands for the history so far."""
    return self._hash.hexdigest()
