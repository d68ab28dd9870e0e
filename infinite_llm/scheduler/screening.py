"""Which messages an rManager refuses: those that no sane sender would send.

Types are the transport's business; here it is who says what to whom, and
whether the numbers can mean anything. A late or repeated message is no fault.
"""

from collections.abc import Sequence

from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchReply,
  Introduction,
  Release,
  ReleaseReply,
  Renew,
  Renewed,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.messages import (
  ANSWER_TO,
  GMANAGER,
  Address,
  Body,
  Candidates,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  MoveKvcache,
  RecallKvcache,
  Reply,
  Request,
)
from infinite_llm.types import InstanceId, RequestUid

_ANSWERS = (
  ReserveReply,
  CommitReply,
  ReleaseReply,
  SyncReply,
  FetchReply,
  Renewed,
  Introduction,
)
_FROM_DEBTOR = (Reserve, Commit, Release, Sync, Fetch, Renew)
_FROM_GMANAGER = (
  Candidates,
  ClusterStatus,
  FullHeartbeatRequest,
  MoveKvcache,
  RecallKvcache,
)


def fault_in(
  envelope: Envelope,
  *,
  instance: InstanceId,
  num_instances: int,
  spill_slots: int,
  gmanagers: Sequence[Address] = (GMANAGER,),
) -> str | None:
  """Says why an rManager refuses a message.

  Args:
    envelope: The message.
    instance: The rManager's instance.
    num_instances: I, instances of its lending group.
    spill_slots: S, spill slots of each owner.
    gmanagers: Those that it reports to.

  Returns:
    What is wrong with it; None if nothing is.
  """
  sender = envelope.sender
  if envelope.receiver != instance:
    return f"receiver must be {instance}; got {envelope.receiver!r}."
  if not isinstance(sender, int):
    is_known = sender in gmanagers
    if not is_known or not isinstance(envelope.body, _FROM_GMANAGER):
      return _not_from(envelope)
    return _fault_from_gmanager(envelope.body, instance, num_instances)
  if sender == instance or not 0 <= sender < num_instances:
    return (
      f"sender must be another instance in [0, {num_instances}); got {sender}."
    )
  is_answer = isinstance(envelope.body, _ANSWERS)
  if not is_answer and not isinstance(envelope.body, _FROM_DEBTOR):
    return _not_from(envelope)
  if envelope.incarnation < 1 or envelope.seq < 1:
    return (
      "incarnation and seq must be at least 1; got"
      f" {envelope.incarnation} and {envelope.seq}."
    )
  if min(envelope.settled, envelope.meant_for, envelope.responder) < 0:
    return (
      "settled, meant_for and responder must not be negative; got"
      f" {envelope.settled}, {envelope.meant_for} and {envelope.responder}."
    )
  if is_answer != bool(envelope.responder):
    return (
      f"responder must be set in answers alone; got {envelope.responder} in a"
      f" {_kind(envelope.body)}."
    )
  return _fault_in_body(envelope.body, spill_slots)


def fault_in_answer(request: Request, reply: Reply) -> str | None:
  """Says why an answer cannot belong to what was asked.

  Args:
    request: What was asked.
    reply: The answer.

  Returns:
    What is wrong with it; None if nothing is.
  """
  expected = ANSWER_TO[type(request)]
  if not isinstance(reply, expected):
    return (
      f"the answer to a {_kind(request)} must be a {expected.__name__}; got a"
      f" {_kind(reply)}."
    )
  match request, reply:
    case Reserve(num_blocks=wanted), ReserveReply(grants=grants):
      if len(grants) > wanted:
        return f"grants must be at most {wanted}; got {len(grants)}."
    case Sync(entries=entries), SyncReply(table_version=version, missing=lost):
      known = {entry.logical_id for entry in entries}
      if not known.issuperset(lost) or (version is None) != bool(lost):
        return (
          "missing must be some of the synced rBlocks if and only if there is"
          f" no table_version; got {lost} and {version}."
        )
    case _:
      pass
  return None


def _fault_from_gmanager(
  body: Body, instance: InstanceId, num_instances: int
) -> str | None:
  match body:
    case Candidates(instances=instances):
      others = set(range(num_instances)) - {instance}
      if not others.issuperset(instances):
        return (
          f"instances must be others in [0, {num_instances}); got {instances}."
        )
    case ClusterStatus(lendable=lendable):
      if lendable < 0:
        return f"lendable must not be negative; got {lendable}."
    case MoveKvcache(num_blocks=num_blocks, dst=peer):
      return _fault_in_plan(num_blocks, peer, instance, num_instances)
    case RecallKvcache(num_blocks=num_blocks, src=peer, freeze_s=freeze_s):
      if not freeze_s >= 0:
        return f"freeze_s must not be negative; got {freeze_s}."
      return _fault_in_plan(num_blocks, peer, instance, num_instances)
    case _:
      pass
  return None


def _fault_in_plan(
  num_blocks: int,
  peer: InstanceId,
  instance: InstanceId,
  num_instances: int,
) -> str | None:
  if num_blocks < 1:
    return f"num_blocks must be at least 1; got {num_blocks}."
  if peer == instance or not 0 <= peer < num_instances:
    return (
      f"a plan must name another instance in [0, {num_instances}); got {peer}."
    )
  return None


def _fault_in_body(body: Body, spill_slots: int) -> str | None:
  match body:
    case Reserve(uid=uid, slot=slot, num_blocks=num_blocks):
      if num_blocks < 1:
        return f"num_blocks must be at least 1; got {num_blocks}."
      return _fault_in_names(uid, slot, spill_slots)
    case (
      Commit(uid=uid, slot=slot, entries=entries)
      | Sync(uid=uid, slot=slot, entries=entries)
    ):
      return _fault_in_names(uid, slot, spill_slots) or _fault_in_entries(
        [entry.logical_id for entry in entries],
        [entry.grant.block_id for entry in entries],
      )
    case Fetch(uid=uid, slot=slot, entries=entries):
      logical_ids = [entry.logical_id for entry in entries]
      return (
        _fault_in_names(uid, slot, spill_slots)
        or _fault_in_entries(logical_ids, [e.grant.block_id for e in entries])
        or _fault_in_entries(logical_ids, [e.home.block_id for e in entries])
      )
    case Release(slot=slot, grants=grants):
      return _fault_in_slot(slot, spill_slots) or _fault_in_entries(
        range(len(grants)), [grant.block_id for grant in grants]
      )
    case ReserveReply(grants=grants):
      block_ids = [grant.block_id for grant in grants]
      if len(set(block_ids)) < len(block_ids):
        return f"grants must name each rBlock once; got {block_ids}."
    case (
      CommitReply(table_version=version)
      | ReleaseReply(table_version=version)
      | SyncReply(table_version=version)
      | FetchReply(table_version=version)
    ):
      if version is not None and version < 0:
        return f"table_version must not be negative; got {version}."
    case _:
      pass
  return None


def _fault_in_names(
  uid: RequestUid, slot: SlotName, spill_slots: int
) -> str | None:
  if not 0 < uid < 2**32:
    return f"uid must be in [1, 2**32); got {uid}."
  return _fault_in_slot(slot, spill_slots)


def _fault_in_slot(slot: SlotName, spill_slots: int) -> str | None:
  if not 0 <= slot.slot < spill_slots or slot.epoch < 1:
    return (
      f"slot must be in [0, {spill_slots}) and its epoch at least 1; got"
      f" {slot}."
    )
  return None


def _fault_in_entries(
  logical_ids: Sequence[int], block_ids: Sequence[int]
) -> str | None:
  if not logical_ids:
    return "entries must not be empty; got ()."
  if min(*logical_ids, *block_ids) < 0:
    return (
      "logical_id and block_id must not be negative; got"
      f" {list(logical_ids)} and {list(block_ids)}."
    )
  for name, numbers in (("logical_id", logical_ids), ("block_id", block_ids)):
    if len(set(numbers)) < len(numbers):
      return f"each {name} must be named once; got {list(numbers)}."
  return None


def _not_from(envelope: Envelope) -> str:
  return (
    f"a {_kind(envelope.body)} must not come from {envelope.sender!r} to an"
    " rManager."
  )


def _kind(body: Body) -> str:
  return type(body).__name__
