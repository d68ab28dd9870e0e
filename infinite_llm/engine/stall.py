"""When a lending group has waited for rBlocks long enough."""

from collections.abc import Callable

from infinite_llm.config import LendingConfig

_ROUNDS_TOGETHER = 3
_ROUNDS_ALONE = 30
"""Rounds of messages to wait for; they may be lost again and again."""


class StallWatch:
  """Adds up the time in which nothing could go on."""

  def __init__(self, lending: LendingConfig, clock: Callable[[], float]):
    """Starts without a stall.

    Args:
      lending: How long a round of messages takes.
      clock: Monotonic seconds.
    """
    self._round_s = max(lending.resend_after_s, lending.heartbeat_every_s)
    self._clock = clock
    self._last_step_s = clock()
    self._stalled_s = 0.0

  def progress(self) -> None:
    """Notes a step in which something went on."""
    self._stalled_s = 0.0
    self._last_step_s = self._clock()

  def is_over(self, num_running: int) -> bool:
    """Notes a step in which nothing went on.

    Args:
      num_running: Requests that wait for each other.

    Returns:
      Whether one of them must give way now; then the time begins anew.
    """
    now_s = self._clock()
    # Time in which nobody called `step` is no stall: messages waited as well.
    self._stalled_s += min(now_s - self._last_step_s, self._round_s)
    self._last_step_s = now_s
    rounds = _ROUNDS_TOGETHER if num_running > 1 else _ROUNDS_ALONE
    if self._stalled_s < rounds * self._round_s:
      return False
    self._stalled_s = 0.0
    return True
