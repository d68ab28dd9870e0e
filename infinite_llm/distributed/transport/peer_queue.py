"""Frames that wait for a peer: bounded in number and in time."""

import collections
import dataclasses
import threading
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waiting:
  """A frame that waits to be sent.

  Attributes:
    frame: The message.
    is_replaceable: A later message of its kind says all that it says.
    expires_s: When it is worth nothing any more, as of the queue's clock.
  """

  frame: bytes
  is_replaceable: bool
  expires_s: float


class PeerQueue:
  """First in, first out; a full one drops the oldest that can be spared.

  Any thread may add to it; one takes from it.
  """

  def __init__(
    self,
    max_frames: int,
    clock: Callable[[], float],
    on_drop: Callable[[Waiting], None],
    on_expiry: Callable[[Waiting], None],
  ):
    """Makes an empty queue.

    Args:
      max_frames: Most frames that wait.
      clock: Monotonic seconds.
      on_drop: Called with each frame that made room for another.
      on_expiry: Called with each frame that waited too long.
    """
    self._max_frames = max_frames
    self._clock = clock
    self._on_drop = on_drop
    self._on_expiry = on_expiry
    self._frames: collections.deque[Waiting] = collections.deque()
    self._changed = threading.Condition()
    self._is_sending = False
    self._is_closed = False

  def load(self) -> tuple[int, int]:
    """How many frames wait, and how many (0 or 1) are being sent."""
    with self._changed:
      return len(self._frames), int(self._is_sending)

  def put(self, frame: Waiting) -> None:
    """Adds a frame, in place of another if the queue is full.

    The oldest replaceable one makes room; if there is none, the oldest.
    """
    with self._changed:
      dropped = None
      if len(self._frames) == self._max_frames:
        spare = (i for i, old in enumerate(self._frames) if old.is_replaceable)
        index = next(spare, 0)
        dropped = self._frames[index]
        del self._frames[index]
      self._frames.append(frame)
      self._changed.notify()
    if dropped is not None:
      self._on_drop(dropped)

  def take(self) -> tuple[Waiting, float] | None:
    """Takes the oldest frame; the one taken before is done with.

    Blocks the caller until there is one.

    Returns:
      The frame and the seconds, more than 0, before it expires; None once the
      queue is closed.
    """
    while True:
      with self._changed:
        self._is_sending = False
        self._changed.wait_for(lambda: self._frames or self._is_closed)
        if self._is_closed:
          return None
        frame = self._frames.popleft()
        self._is_sending = True
      remaining_s = frame.expires_s - self._clock()
      if remaining_s > 0:
        return frame, remaining_s
      self._on_expiry(frame)

  def close(self) -> None:
    """Ends `take`, now and later; frames that wait are forgotten."""
    with self._changed:
      self._is_closed = True
      self._frames.clear()
      self._changed.notify_all()
