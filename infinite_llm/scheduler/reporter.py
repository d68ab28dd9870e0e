"""What an rManager tells the gManagers, and which of them it listens to."""

import collections
from collections.abc import Callable, Iterable, Sequence

from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.account import Account
from infinite_llm.scheduler.mailbox import Outbox
from infinite_llm.scheduler.messages import (
  BlocksOf,
  Body,
  ClusterStatus,
  Envelope,
  GManagerAddress,
  Heartbeat,
  MoveKvcache,
  RecallKvcache,
  RequestBlocks,
)
from infinite_llm.types import NO_EPOCH, Epoch

_IN_ORDER: dict[type[Body], type[Body]] = {
  ClusterStatus: ClusterStatus,
  MoveKvcache: MoveKvcache,
  RecallKvcache: MoveKvcache,
}
"""Messages of a leader that count only if no later one of their kind came:
a status, and all plans together."""


class Reporter:
  """Sends heartbeats to all gManagers and follows the one that leads.

  Attributes:
    gmanagers: Those that are told.
    leader_epoch: Newest epoch of a leading gManager that was heard of.
    void: Messages of gManagers that did not count: "fenced" ones of older
      epochs, and "overtaken" plans and statuses, which came again or after a
      later one.
  """

  def __init__(
    self,
    outbox: Outbox[Account],
    lending: LendingConfig,
    clock: Callable[[], float],
    gmanagers: Sequence[GManagerAddress],
  ):
    """Makes a reporter that has told nothing and heard of nobody.

    Args:
      outbox: Takes its messages.
      lending: How often heartbeats are due.
      clock: Monotonic seconds.
      gmanagers: Whom to tell.
    """
    self.gmanagers = tuple(gmanagers)
    self.leader_epoch: Epoch = NO_EPOCH
    self.void: collections.Counter[str] = collections.Counter()
    self._outbox = outbox
    self._lending = lending
    self._clock = clock
    self._told: Heartbeat | None = None
    self._told_s = 0.0
    self._told_seq = 0
    self._num_changes = 0
    self._newest_seq: dict[type[Body], int] = {}

  def is_due(self) -> bool:
    """Whether it is time for a heartbeat."""
    period_s = self._lending.heartbeat_every_s
    return self._told is None or self._clock() - self._told_s >= period_s

  def tell(self, state: Heartbeat, *, is_full: bool = False) -> None:
    """Sends a heartbeat: what changed since the last one, or everything.

    Args:
      state: Everything.
      is_full: Whether all of it is asked for; now and then it is sent anyway.
    """
    heartbeat = state
    told = self._told
    is_full |= self._num_changes + 1 >= self._lending.full_heartbeat_every
    if told is None or is_full:
      self._num_changes = 0
    else:
      self._num_changes += 1
      heartbeat = state.since(
        self._told_seq,
        lent=_changes(told.lent, state.lent),
        requests=_request_changes(told.requests, state.requests),
      )
    self._told = state
    self._told_s = self._clock()
    self._told_seq = self._outbox.tell_all(self.gmanagers, heartbeat)

  def follow(self, envelope: Envelope) -> bool:
    """Decides whether a gManager is to be listened to.

    A leader whose epoch is older than one that was heard of may be dead, or may
    not know that another leads now: whatever it says does not count. The first
    message of a newer epoch moves all questions to its sender.

    A plan or a status counts once, and not after a later one: a leader numbers
    what it says. Plans are advice, so those that were overtaken are no loss.

    Args:
      envelope: A message of one of `gmanagers`.

    Returns:
      Whether it counts.
    """
    if envelope.leader_epoch < self.leader_epoch:
      self.void["fenced"] += 1
      return False
    if envelope.leader_epoch > self.leader_epoch:
      self.leader_epoch = envelope.leader_epoch
      self._newest_seq.clear()
      if not isinstance(envelope.sender, int):
        self._outbox.ask_leader(envelope.sender)
    kind = _IN_ORDER.get(type(envelope.body))
    if kind is not None:
      if envelope.seq <= self._newest_seq.get(kind, 0):
        self.void["overtaken"] += 1
        return False
      self._newest_seq[kind] = envelope.seq
    return True


def _changes(old: BlocksOf, new: BlocksOf) -> BlocksOf:
  """Instances whose number differs; those that are gone have a 0."""
  if old == new:  # Nearly always, and it is asked each heartbeat.
    return ()
  before = dict(old)
  changed = [
    (instance, count)
    for instance, count in new
    if before.pop(instance, None) != count
  ]
  return *changed, *((instance, 0) for instance in before)


def _request_changes(
  old: Iterable[RequestBlocks], new: Iterable[RequestBlocks]
) -> tuple[RequestBlocks, ...]:
  """Requests that differ; those that have ended have no holders."""
  if old == new:
    return ()
  before = {blocks.uid: blocks for blocks in old}
  changed = [blocks for blocks in new if before.pop(blocks.uid, None) != blocks]
  ended = [RequestBlocks(uid=uid, holders=()) for uid in before]
  return tuple(changed + ended)
