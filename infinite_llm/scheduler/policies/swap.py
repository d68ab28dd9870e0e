"""Swapping: an instance that runs short uses its own host memory (a baseline).

Nothing goes to other instances. What is preempted waits in the HOST tier
instead of being computed again.
"""

from infinite_llm.scheduler.policies.static import (
  choose_victim,
  plan_moves,
  plan_recalls,
  rank_creditors,
)

__all__ = [
  "BORROWS",
  "SWAPS_TO_HOST",
  "choose_victim",
  "plan_moves",
  "plan_recalls",
  "rank_creditors",
]

BORROWS = False
SWAPS_TO_HOST = True
