"""Which messages an rManager refuses: those that no sane sender would send.

Types are the transport's business; here it is who says what to whom, and
whether the numbers can mean anything: what comes through must not be able to
break a book, a table or an array on a device. A late or repeated message is no
fault.
"""

import dataclasses
import math
import reprlib
from collections.abc import Sequence

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchReply,
  Grant,
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
  GMANAGERS,
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
from infinite_llm.types import NO_EPOCH, Epoch, InstanceId, RequestUid

MAX_EPOCHS_MISSED = 2**20
"""Leader epochs that one may have missed; what is further ahead is nonsense.

Each takeover uses up to 512 of them, so this is some 2,000 takeovers.
"""

MOST_ARRIVAL = 2**63 - 1
"""Largest arrival number that a message can carry."""

_MAX_FIRST_EPOCH = 2**31
"""Newest leader epoch that is believed by who has not heard of any."""

_MAX_VERSION = 2**31 - 1
"""Table versions are int32 on the devices."""

_MAX_CANDIDATES = 3
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """A lending group as one of its rManagers knows it.

  Attributes:
    instance: The rManager's instance.
    num_instances: I, instances of the group.
    num_blocks: N, rBlocks of each pool with the null one.
    spill_slots: S, spill slots of each owner.
    host_blocks: rBlocks of host memory that a request may have while it runs.
    gmanagers: Those that the rManager reports to.
  """

  instance: InstanceId
  num_instances: int
  num_blocks: int
  spill_slots: int
  host_blocks: int = 0
  gmanagers: Sequence[Address] = (GMANAGER,)

  def __post_init__(self):
    if not 0 <= self.instance < self.num_instances:
      raise ConfigError(
        f"instance must be in [0, {self.num_instances}); got {self.instance}."
      )
    is_known = self.gmanagers and set(self.gmanagers) <= set(GMANAGERS)
    if not is_known:
      raise ConfigError(
        f"gmanagers must be some of {', '.join(GMANAGERS)}; got"
        f" {self.gmanagers!r}."
      )


def fault_in(
  envelope: Envelope, group: Group, leader_epoch: Epoch = NO_EPOCH
) -> str | None:
  """Says why an rManager refuses a message.

  Args:
    envelope: The message.
    group: Who may say what.
    leader_epoch: Newest epoch of a leading gManager that was heard of.

  Returns:
    What is wrong with it; None if nothing is.
  """
  sender, instance = envelope.sender, group.instance
  if envelope.receiver != instance:
    return f"receiver must be {instance}; got {envelope.receiver!r}."
  if not isinstance(sender, int):
    is_known = sender in group.gmanagers
    if not is_known or not isinstance(envelope.body, _FROM_GMANAGER):
      return _not_from(envelope)
    return (
      fault_in_numbers(envelope)
      or fault_in_leader_epoch(envelope.leader_epoch, leader_epoch)
      or _fault_from_gmanager(envelope.body, group)
    )
  if sender == instance or not 0 <= sender < group.num_instances:
    return (
      "sender must be another instance in"
      f" [0, {group.num_instances}); got {sender}."
    )
  is_answer = isinstance(envelope.body, _ANSWERS)
  if not is_answer and not isinstance(envelope.body, _FROM_DEBTOR):
    return _not_from(envelope)
  fault = fault_in_numbers(envelope)
  if fault is not None:
    return fault
  if is_answer != bool(envelope.responder):
    return (
      f"responder must be set in answers alone; got {envelope.responder} in a"
      f" {_kind(envelope.body)}."
    )
  return _fault_in_body(envelope.body, group)


def fault_in_numbers(envelope: Envelope) -> str | None:
  """Says why an envelope's numbers cannot be a sender's; None if they can."""
  if envelope.incarnation < 1 or envelope.seq < 1:
    return (
      "incarnation and seq must be at least 1; got"
      f" {envelope.incarnation} and {envelope.seq}."
    )
  if envelope.settled < 0 or envelope.meant_for < 0 or envelope.responder < 0:
    return (
      "settled, meant_for and responder must not be negative; got"
      f" {envelope.settled}, {envelope.meant_for} and {envelope.responder}."
    )
  if envelope.settled > envelope.seq:
    return f"settled must be at most {envelope.seq}; got {envelope.settled}."
  if isinstance(envelope.sender, int) and envelope.leader_epoch != NO_EPOCH:
    return (
      "leader_epoch must be 0 in what an instance says; got"
      f" {envelope.leader_epoch}."
    )
  return None


def fault_in_leader_epoch(epoch: Epoch, newest: Epoch) -> str | None:
  """Says why nobody can lead under an epoch.

  Args:
    epoch: What a message names.
    newest: Newest epoch that was heard of; 0 if none was.

  Returns:
    What is wrong with it; None if nothing is.
  """
  most = newest + MAX_EPOCHS_MISSED if newest else _MAX_FIRST_EPOCH
  if not 0 <= epoch <= most:
    return f"leader_epoch must be in [0, {most}]; got {epoch}."
  return None


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


def _fault_from_gmanager(body: Body, group: Group) -> str | None:
  match body:
    case Candidates(rooms=rooms):
      instances = [instance for instance, _ in rooms]
      others = set(range(group.num_instances)) - {group.instance}
      if not others.issuperset(instances):
        return (
          f"rooms must be of others in [0, {group.num_instances}); got"
          f" {reprlib.repr(instances)}."
        )
      is_repeated = len(set(instances)) < len(instances)
      if is_repeated or len(instances) > _MAX_CANDIDATES:
        return (
          f"rooms must be of at most {_MAX_CANDIDATES} different ones; got"
          f" {reprlib.repr(instances)}."
        )
      for _, room in rooms:
        fault = _fault_in_range("room", room, 1, _most_blocks(group, 1))
        if fault is not None:
          return fault
    case ClusterStatus(lendable=lendable, allotted_to=allotted_to):
      return _fault_in_range(
        "lendable", lendable, 0, _most_blocks(group, group.num_instances - 1)
      ) or _fault_in_range("allotted_to", allotted_to, 0, MOST_ARRIVAL)
    case MoveKvcache(uid=uid, num_blocks=num_blocks, dst=peer):
      return _fault_in_plan(uid, num_blocks, peer, group)
    case RecallKvcache(uid=uid, num_blocks=num_blocks, src=peer) as plan:
      if not plan.freeze_s >= 0:
        return f"freeze_s must not be negative; got {plan.freeze_s}."
      return _fault_in_plan(uid, num_blocks, peer, group)
    case _:
      pass
  return None


def _fault_in_plan(
  uid: RequestUid, num_blocks: int, peer: InstanceId, group: Group
) -> str | None:
  if peer == group.instance or not 0 <= peer < group.num_instances:
    return (
      f"a plan must name another instance in [0, {group.num_instances}); got"
      f" {peer}."
    )
  return _fault_in_count(num_blocks, group) or _fault_in_uid(uid)


def _fault_in_body(body: Body, group: Group) -> str | None:
  match body:
    case Reserve(uid=uid, slot=slot, num_blocks=num_blocks):
      return (
        _fault_in_count(num_blocks, group)
        or _fault_in_uid(uid)
        or _fault_in_slot(slot, group)
      )
    case (
      Commit(uid=uid, slot=slot, entries=entries)
      | Sync(uid=uid, slot=slot, entries=entries)
    ):
      return (
        _fault_in_uid(uid)
        or _fault_in_slot(slot, group)
        or _fault_in_lines([entry.logical_id for entry in entries], group)
        or _fault_in_grants([entry.grant for entry in entries], group)
      )
    case Fetch(uid=uid, slot=slot, entries=entries):
      return (
        _fault_in_uid(uid)
        or _fault_in_slot(slot, group)
        or _fault_in_lines([entry.logical_id for entry in entries], group)
        or _fault_in_grants([entry.grant for entry in entries], group)
        or _fault_in_grants([entry.home for entry in entries], group)
      )
    case Release(slot=slot, grants=grants):
      return (
        _fault_in_slot(slot, group)
        or _fault_in_lines(range(len(grants)), group)
        or _fault_in_grants(grants, group)
      )
    case ReserveReply(grants=grants):
      return _fault_in_grants(grants, group)
    case (
      CommitReply(table_version=version)
      | ReleaseReply(table_version=version)
      | SyncReply(table_version=version)
      | FetchReply(table_version=version)
    ):
      if version is not None:
        return _fault_in_range("table_version", version, 0, _MAX_VERSION)
    case Renew(sent_s=sent_s) | Renewed(sent_s=sent_s):
      if not math.isfinite(sent_s):
        return f"sent_s must be finite; got {sent_s}."
    case _:
      pass
  return None


def _fault_in_uid(uid: RequestUid) -> str | None:
  return _fault_in_range("uid", uid, 1, 2**32 - 1)


def _fault_in_count(num_blocks: int, group: Group) -> str | None:
  """Nobody has more rBlocks at home, or with one creditor, than a pool has."""
  return _fault_in_range("num_blocks", num_blocks, 1, _most_blocks(group, 1))


def _fault_in_slot(slot: SlotName, group: Group) -> str | None:
  return _fault_in_range(
    "slot", slot.slot, 0, group.spill_slots - 1
  ) or _fault_in_range("the slot's epoch", slot.epoch, 1, 2**32 - 1)


def _fault_in_lines(logical_ids: Sequence[int], group: Group) -> str | None:
  """A request has no more rBlocks than all that it could have them in."""
  if not logical_ids:
    return "entries must not be empty; got ()."
  most = _most_blocks(group, group.num_instances) + group.host_blocks
  return _fault_in_names("logical_id", logical_ids, 0, most - 1)


def _fault_in_grants(grants: Sequence[Grant], group: Group) -> str | None:
  if not grants:
    return None
  block_ids = [grant.block_id for grant in grants]
  fault = _fault_in_names("block_id", block_ids, 1, _most_blocks(group, 1))
  if fault is not None:
    return fault
  epochs = [grant.epoch for grant in grants]
  worst = min(epochs) if min(epochs) < 1 else max(epochs)
  return _fault_in_range("the epoch of a grant", worst, 1, 2**32 - 1)


def _fault_in_names(
  name: str, numbers: Sequence[int], low: int, high: int
) -> str | None:
  """Numbers of a list must be in a range, and differ."""
  worst = min(numbers) if min(numbers) < low else max(numbers)
  fault = _fault_in_range(name, worst, low, high)
  if fault is None and len(set(numbers)) < len(numbers):
    return f"each {name} must be named once; got {reprlib.repr(numbers)}."
  return fault


def _fault_in_range(name: str, value: int, low: int, high: int) -> str | None:
  if not low <= value <= high:
    return f"{name} must be in [{low}, {high}]; got {value}."
  return None


def _most_blocks(group: Group, num_pools: int) -> int:
  return num_pools * (group.num_blocks - 1)


def _not_from(envelope: Envelope) -> str:
  return (
    f"a {_kind(envelope.body)} must not come from {envelope.sender!r} to an"
    " rManager."
  )


def _kind(body: Body) -> str:
  return type(body).__name__
