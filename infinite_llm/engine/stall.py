"""What to do when requests wait for rBlocks and nothing goes on."""

import time
from collections.abc import Callable, Sequence

from absl import logging

from infinite_llm.config import LendingConfig
from infinite_llm.engine.request_book import RequestBook
from infinite_llm.errors import CapacityError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.types import InstanceId

_IDLE_S = 0.0005
"""Pause of a step that finds nothing to do but wait for a message."""

_ROUNDS_TOGETHER = 3
_ROUNDS_ALONE = 30
"""Rounds of messages to wait for; they may be lost again and again."""


class StallBreaker:
  """Adds up the time in which nothing could go on, and ends it."""

  def __init__(
    self,
    lending: LendingConfig,
    clock: Callable[[], float],
    book: RequestBook,
    instances: Sequence[InstanceId],
    batchers: Sequence[Batcher],
  ):
    """Starts without a stall.

    Args:
      lending: How long a round of messages takes.
      clock: Monotonic seconds.
      book: All requests.
      instances: Numbers of the instances.
      batchers: Continuous batching of each instance.
    """
    self._round_s = max(lending.resend_after_s, lending.heartbeat_every_s)
    self._clock = clock
    self._book = book
    self._instances = instances
    self._batchers = batchers
    self._last_step_s = clock()
    self._stalled_s = 0.0

  def progress(self) -> None:
    """Notes a step in which something went on."""
    self._stalled_s = 0.0
    self._last_step_s = self._clock()

  def wait(self) -> None:
    """Pauses in a step in which nothing went on, or makes room at last.

    The youngest running request gives its rBlocks up and is computed again
    later, so the oldest always gets through. One that is alone fails, but much
    later: it may be waiting for messages that are lost again and again. Nothing
    is under way on the devices.
    """
    running = self._book.running()
    now_s = self._clock()
    # Time in which nobody called `step` is no stall: messages waited as well.
    self._stalled_s += min(now_s - self._last_step_s, self._round_s)
    self._last_step_s = now_s
    rounds = _ROUNDS_TOGETHER if len(running) > 1 else _ROUNDS_ALONE
    if self._stalled_s < rounds * self._round_s:
      time.sleep(_IDLE_S)
      return
    self._stalled_s = 0.0
    if len(running) > 1:
      youngest = running[-1]
      logging.warning(
        "All requests wait for rBlocks; %s gives its own up.",
        youngest.request.request_id,
      )
      self._batcher(youngest.instance).preempt(youngest.request.uid)
      return
    stuck = (running or list(self._book))[0]
    counts = [batcher.pool_counts() for batcher in self._batchers]
    error = CapacityError(
      f"Request {stuck.request.request_id} needs room for"
      f" {stuck.request.num_tokens + 1} tokens, which nobody gives up:"
      f" {counts}."
    )
    self._batcher(stuck.instance).fail(stuck.request.uid, error)

  def _batcher(self, instance: InstanceId) -> Batcher:
    return self._batchers[self._instances.index(instance)]
