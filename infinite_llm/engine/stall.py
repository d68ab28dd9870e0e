"""What to do when requests wait for rBlocks and nothing goes on."""

import time
from collections.abc import Callable, Sequence

from absl import logging

from infinite_llm.config import LendingConfig
from infinite_llm.engine.request_book import Entry, RequestBook
from infinite_llm.errors import CapacityError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.stalls import StandingAside, who_gives_up
from infinite_llm.types import InstanceId, RequestUid

_IDLE_S = 0.0005
"""Pause of a step that finds nothing to do but wait for a message."""

REPORT_EVERY_S = 0.05
"""Members of a group say no more often how long nothing went on with them."""


class StallBreaker:
  """Adds up the time in which nothing could go on, and ends it.

  The youngest running request gives its rBlocks up (`scheduler/stalls.py`) and
  is computed again later. One that is alone fails, but much later: it may be
  waiting for messages that are lost again and again. With other processes,
  whoever hears of all of them decides who that is, and for how long.
  """

  def __init__(
    self,
    lending: LendingConfig,
    clock: Callable[[], float],
    book: RequestBook,
    instances: Sequence[InstanceId],
    batchers: Sequence[Batcher],
    *,
    is_shared: bool,
  ):
    """Starts without a stall.

    Args:
      lending: How long a round of messages takes.
      clock: Monotonic seconds.
      book: All requests.
      instances: Numbers of the instances.
      batchers: Continuous batching of each instance.
      is_shared: Whether other processes have requests too.
    """
    # What members say is so old when process 0 judges by it.
    said_s = REPORT_EVERY_S if is_shared else 0.0
    self._round_s = max(
      lending.resend_after_s, lending.heartbeat_every_s, said_s
    )
    self._clock = clock
    self._book = book
    self._instances = instances
    self._batchers = batchers
    self._is_shared = is_shared
    self._aside = StandingAside()
    self._last_step_s = clock()
    self._stalled_s = 0.0

  @property
  def rounds(self) -> int:
    """Rounds of messages in which nothing went on."""
    return int(self._stalled_s / self._round_s)

  def progress(self) -> None:
    """Notes a step in which something went on."""
    self._stalled_s = 0.0
    self._last_step_s = self._clock()

  def wait(self) -> None:
    """Pauses in a step in which nothing went on, or makes room at last.

    Nothing is under way on the devices.
    """
    now_s = self._clock()
    # Time in which nobody called `step` is no stall: messages waited as well.
    self._stalled_s += min(now_s - self._last_step_s, self._round_s)
    self._last_step_s = now_s
    running = [entry.request.uid for entry in self._book.running()]
    waiting = [entry.request.uid for entry in self._book]
    chosen = who_gives_up(running, waiting, self.rounds)
    if self._is_shared or chosen is None:
      time.sleep(_IDLE_S)
      return
    is_alone = len(running) <= 1
    if not is_alone:
      self._aside.add(chosen, running)
    self.give_up(chosen, is_alone=is_alone)

  def give_up(self, uid: RequestUid, *, is_alone: bool) -> None:
    """Has a request give its rBlocks up.

    Args:
      uid: The request; one that ended meanwhile is left alone.
      is_alone: Whether nobody else has any, so that it cannot go on.
    """
    self._stalled_s = 0.0
    if uid not in self._book:
      return
    entry = self._book[uid]
    if is_alone:
      self._fail(entry)
    elif any(each is entry for each in self._book.running()):
      logging.warning(
        "All requests wait for rBlocks; %s gives its own up.",
        entry.request.request_id,
      )
      self._batcher(entry.instance).preempt(uid)
      entry.request.stands_aside = True

  def come_back(self, uid: RequestUid) -> None:
    """Lets a request that gave its rBlocks up run again; any may have ended."""
    if uid in self._book:
      self._book[uid].request.stands_aside = False

  def ended(self, uid: RequestUid) -> None:
    """Notes that a request of this process ended."""
    for each in self._aside.ended(uid):
      self.come_back(each)

  def _fail(self, entry: Entry) -> None:
    counts = [batcher.pool_counts() for batcher in self._batchers]
    error = CapacityError(
      f"Request {entry.request.request_id} needs room for"
      f" {entry.request.num_tokens + 1} tokens, which nobody gives up:"
      f" {counts}."
    )
    self._batcher(entry.instance).fail(entry.request.uid, error)

  def _batcher(self, instance: InstanceId) -> Batcher:
    return self._batchers[self._instances.index(instance)]
