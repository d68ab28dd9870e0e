"""What an rManager does about the gManager's plans, and when it is frozen."""

from collections.abc import Callable

from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.creditor import Creditor
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.effects import Effect, MigrateRequest
from infinite_llm.scheduler.messages import MoveKvcache, Plan, RecallKvcache
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.types import InstanceId, RequestUid


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
    effects: list[Effect],
    lending: LendingConfig,
    clock: Callable[[], float],
  ):
    """Makes a follower that is not frozen.

    Args:
      creditor: Lends nothing while frozen.
      debtor: Moves rBlocks; allocates and borrows nothing while frozen.
      effects: Takes the requests that are to run elsewhere.
      lending: The policy, and the longest time to be frozen: that of a lease.
      clock: Monotonic seconds.
    """
    self.num_followed = 0
    self.num_declined = 0
    self._creditor = creditor
    self._debtor = debtor
    self._clock = clock
    self._effects = effects
    self._migrates = get_policy(lending.policy).migrates
    self._most_frozen_s = lending.lease_s
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
      case MoveKvcache(with_request=True, dst=dst):
        is_followed = self._migrate(uid, dst)
      case MoveKvcache(dst=dst):
        is_followed = self._debtor.move_kvcache(uid, num_blocks, dst)
    self.num_followed += is_followed
    self.num_declined += not is_followed

  def _migrate(self, uid: RequestUid, dst: InstanceId) -> bool:
    """Hands a request out that may leave; whether it does.

    Where the policy migrates nothing, nobody would carry it out.
    """
    can_leave = self._debtor.account(uid).can_leave()
    if not self._migrates or self._debtor.is_frozen or not can_leave:
      return False
    self._effects.append(MigrateRequest(uid=uid, dst=dst))
    return True

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
