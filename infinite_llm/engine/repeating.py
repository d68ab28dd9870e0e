"""What is to be done from time to time, called as often as one likes."""

from collections.abc import Callable


def at_most_every(
  period_s: float, clock: Callable[[], float], action: Callable[[], None]
) -> Callable[[], None]:
  """Makes something rare of what is called often.

  Args:
    period_s: Seconds that pass between two times, at least.
    clock: Monotonic seconds.
    action: What is to be done.

  Returns:
    Does it, unless it was done too short a time ago.
  """
  last_s = clock()

  def act() -> None:
    nonlocal last_s
    now_s = clock()
    if now_s - last_s >= period_s:
      last_s = now_s
      action()

  return act
