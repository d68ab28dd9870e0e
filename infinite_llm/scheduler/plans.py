"""What an rManager does about the gManager's plans, and when it is frozen."""

from collections.abc import Callable

from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.messages import MoveKvcache, Plan, RecallKvcache
from infinite_llm.types import RequestUid


class PlanFollower:
  """Follows plans where it can; a plan is advice, and the next one comes.

  While an instance is frozen it gives no rBlocks to anybody but to recalls:
  circular debt is dissolved (DGFM), and what becomes free brings rBlocks home.

  Attributes:
    num_followed: Plans that were begun.
    num_declined: Plans that were not.
  """

  def __init__(
    self,
    creditor: Creditor,
    debtor: Debtor,
    clock: Callable[[], float],
    most_frozen_s: float,
  ):
    """Makes a follower that is not frozen.

    Args:
      creditor: Lends nothing while frozen.
      debtor: Moves rBlocks; allocates and borrows nothing while frozen.
      clock: Monotonic seconds.
      most_frozen_s: Longest time to be frozen, whatever is asked.
    """
    self.num_followed = 0
    self.num_declined = 0
    self._creditor = creditor
    self._debtor = debtor
    self._clock = clock
    self._most_frozen_s = most_frozen_s
    self._frozen_until_s = clock()
    self._recalled: RequestUid | None = None

  def follow(self, plan: Plan) -> None:
    """Begins what a plan says, if that is possible now."""
    uid, num_blocks = plan.uid, plan.num_blocks
    match plan:
      case _ if not self._debtor.is_open(uid):
        is_followed = False
      case RecallKvcache(src=src):
        is_followed = self._debtor.recall_kvcache(uid, num_blocks, src)
        if is_followed:
          self.freeze(plan.freeze_s)
          self._recalled = uid
      case MoveKvcache(with_request=True):
        is_followed = False  # Requests run where they were opened.
      case MoveKvcache(dst=dst):
        is_followed = self._debtor.move_kvcache(uid, num_blocks, dst)
    self.num_followed += is_followed
    self.num_declined += not is_followed

  def freeze(self, duration_s: float) -> None:
    """Is frozen from now on for some seconds; 0 ends it."""
    self._recalled = None
    duration_s = min(duration_s, self._most_frozen_s)
    self._frozen_until_s = self._clock() + duration_s
    self.thaw_if_due()

  def thaw_if_due(self) -> None:
    """Ends the frost when its time, or the recall that it is for, is over."""
    is_frozen = self._clock() < self._frozen_until_s
    if self._recalled is not None:
      is_frozen &= self._debtor.is_recalling(self._recalled)
    self._debtor.is_frozen = self._creditor.is_frozen = is_frozen
