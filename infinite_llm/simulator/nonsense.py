"""Messages that no sane sender would send, and what must become of them."""

import dataclasses
import math
import random

from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchedEntry,
  Grant,
  HostedEntry,
  Release,
  Renewed,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
)
from infinite_llm.scheduler.messages import (
  Address,
  Body,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  Heartbeat,
  Leadership,
  MoveKvcache,
  RecallKvcache,
  RequestBlocks,
)
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.simulator.violation import ViolationError
from infinite_llm.types import NO_EPOCH, PoolCounts

_HUGE = 2**40
_SLOT = SlotName(slot=0, epoch=1)
_GRANT = Grant(block_id=1, epoch=1)
_BEYOND = Grant(block_id=2**31 - 1, epoch=1)
_COUNTS = PoolCounts(used=1, free=1, hosted=1, reserved=0, total=3)
_HEARTBEAT = Heartbeat(counts=_COUNTS, lendable=1, num_running=1)

_FROM_INSTANCE: tuple[Body, ...] = (
  Reserve(uid=1, slot=_SLOT, num_blocks=-1),
  Reserve(uid=1, slot=_SLOT, num_blocks=_HUGE),
  Reserve(uid=1, slot=SlotName(slot=_HUGE, epoch=1), num_blocks=1),
  Commit(
    uid=1,
    slot=_SLOT,
    entries=(HostedEntry(logical_id=2**31, grant=_GRANT),),
  ),
  Sync(uid=1, slot=_SLOT, entries=(HostedEntry(logical_id=0, grant=_BEYOND),)),
  Fetch(
    uid=1,
    slot=_SLOT,
    entries=(FetchedEntry(logical_id=0, grant=_GRANT, home=_BEYOND),),
  ),
  Release(slot=_SLOT, grants=(_GRANT,) * 1000),
  ReserveReply(grants=(_BEYOND,)),
  CommitReply(table_version=2**31),
  Renewed(sent_s=math.nan),
  _HEARTBEAT,
  CandidatesRequest(num_blocks=1),
)
_FROM_GMANAGER: tuple[Body, ...] = (
  Candidates(rooms=((-1, 1),)),
  ClusterStatus(lendable=_HUGE),
  ClusterStatus(lendable=0, allotted_to=-1),
  MoveKvcache(uid=1, num_blocks=_HUGE, dst=0),
  RecallKvcache(uid=1, num_blocks=1, src=0, freeze_s=-1.0),
  Reserve(uid=1, slot=_SLOT, num_blocks=1),
)
_TO_GMANAGER: tuple[Body, ...] = (
  _HEARTBEAT,  # One rBlock is hosted, but nothing is lent.
  dataclasses.replace(_HEARTBEAT, lent=((0, 1), (0, 1))),
  dataclasses.replace(_HEARTBEAT, counts=dataclasses.replace(_COUNTS, free=9)),
  dataclasses.replace(_HEARTBEAT, lent=((_HUGE, 1),)),
  dataclasses.replace(_HEARTBEAT, lent=((0, 1),), promised=_HUGE),
  dataclasses.replace(_HEARTBEAT, lent=((0, 1),), local_blocks=4),
  dataclasses.replace(_HEARTBEAT, lent=((0, 1),), next_arrival=1),
  dataclasses.replace(_HEARTBEAT, leader_epoch=2**32 - 1),
  dataclasses.replace(
    _HEARTBEAT, requests=(RequestBlocks(uid=1, holders=((0, _HUGE),)),)
  ),
  CandidatesRequest(num_blocks=0),
  Candidates(rooms=()),
  Leadership(),
)
_ANSWERS = (ReserveReply, CommitReply, Renewed)


def draw_nonsense(
  rng: random.Random, sender: Address, receiver: Address
) -> Envelope:
  """Makes a message that its receiver must refuse, whatever it knows.

  Args:
    rng: Decides.
    sender: Whose name it bears.
    receiver: An rManager; or a gManager, if the sender is an rManager.
  """
  is_from_instance = isinstance(sender, int)
  bodies = _FROM_INSTANCE if is_from_instance else _FROM_GMANAGER
  if not isinstance(receiver, int):
    bodies = _TO_GMANAGER
  body = rng.choice(bodies)
  return Envelope(
    sender=sender,
    receiver=receiver,
    incarnation=1,
    seq=1,
    body=body,
    responder=int(isinstance(body, _ANSWERS)),
    leader_epoch=NO_EPOCH if is_from_instance else 1,
  )


def hand_over_nonsense(
  manager: RManager | GManager, envelope: Envelope
) -> None:
  """Gives a manager that has nothing to say a message that it must refuse.

  Raises:
    ViolationError: If it does not, does not count it, or anything changes.
  """
  before = _books(manager), sum(manager.refused.values()) + 1
  manager.on_message(envelope)
  after = _books(manager), sum(manager.refused.values())
  outgoing = manager.drain_messages()
  effects = [] if isinstance(manager, GManager) else manager.drain_effects()
  if before != after or outgoing or effects:
    raise ViolationError(
      f"{envelope} must be refused and counted; it made {before} of {after},"
      f" {outgoing} and {effects}."
    )


def _books(manager: RManager | GManager) -> object:
  if isinstance(manager, GManager):
    view = manager.view()
    return view.lines, view.placements, manager.epoch, manager.is_leader
  return (
    manager.counts(),
    manager.lent(),
    manager.borrowed(),
    manager.hosted.generation,
    manager.lendable_elsewhere(),
    manager.is_frozen,
  )
