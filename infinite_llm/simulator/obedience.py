"""What one instance may take from its gManagers, at every message of theirs."""

from infinite_llm.scheduler.messages import (
  ClusterStatus,
  Envelope,
  MoveKvcache,
  RecallKvcache,
)
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import NO_EPOCH, Epoch


class Obedience:
  """Sees that an rManager follows the newest leader, in order and once."""

  def __init__(self, manager: RManager):
    """Begins with a manager that has heard of no leader.

    Args:
      manager: The rManager.
    """
    self._manager = manager
    self._leader_epoch: Epoch = NO_EPOCH
    self._newest_status = self._newest_plan = (NO_EPOCH, 0)

  def hand_over(self, envelope: Envelope) -> None:
    """Gives the manager a message of a gManager.

    Raises:
      ViolationError: If it obeys a former leader, anything twice, or anything
        after what the same leader said later; or if what a former leader
        allotted is still in force.
    """
    if envelope.leader_epoch < self._leader_epoch:
      self._hand_over_void(envelope, "is of a former leader")
    elif not self._is_next(envelope):
      self._hand_over_void(envelope, "came before, or a later one did")
    else:
      is_first = envelope.leader_epoch > self._leader_epoch
      self._leader_epoch = envelope.leader_epoch
      self._manager.on_message(envelope)
      has_status = isinstance(envelope.body, ClusterStatus)
      if is_first and not has_status and self._manager.allotted_to:
        raise ViolationError(
          f"Instance {self._manager.instance} has heard of leader epoch"
          f" {self._leader_epoch}, and still counts on what the one before"
          f" allotted to request {self._manager.allotted_to}."
        )

  def _is_next(self, envelope: Envelope) -> bool:
    """Whether a plan or a status is later than all that were heard."""
    name = envelope.leader_epoch, envelope.seq
    match envelope.body:
      case ClusterStatus():
        newest = self._newest_status
        self._newest_status = max(newest, name)
      case MoveKvcache() | RecallKvcache():
        newest = self._newest_plan
        self._newest_plan = max(newest, name)
      case _:
        return True
    return name > newest

  def _hand_over_void(self, envelope: Envelope, why: str) -> None:
    """Gives the manager what must change nothing."""
    manager = self._manager
    before = self._seen()
    manager.on_message(envelope)
    outgoing = manager.drain_messages()
    effects = manager.drain_effects()
    if outgoing or effects or self._seen() != before:
      raise ViolationError(
        f"Instance {manager.instance} has heard of leader epoch"
        f" {self._leader_epoch}, and obeys {envelope}, which {why}."
      )

  def _seen(self) -> tuple[int, int, int, bool, bool]:
    manager = self._manager
    return (
      manager.lendable_elsewhere(),
      manager.allotted_to,
      manager.plans.num_declined,
      manager.is_frozen,
      manager.is_borrowing(),
    )
