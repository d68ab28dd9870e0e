"""Well-formed messages that make no sense, in the middle of a borrow."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.scheduler.lease_messages import (
  Introduction,
  Reserve,
  SlotName,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Body,
  Candidates,
  CandidatesRequest,
  Envelope,
  FullHeartbeatRequest,
  MoveKvcache,
  RecallKvcache,
)
from tests.scheduler.any_message import (
  ENVELOPES,
  absurd,
  kinds,
  places,
  replaced,
)
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster

_SLOTS = 2
_BLOCKS = 9


def _borrowing_cluster(num_rounds):
  """Instance 0 of three moves two rBlocks away, up to some point."""
  cluster = FakeCluster(3, _BLOCKS, spill_slots=_SLOTS)
  cluster.heartbeat()
  cluster.open(0, 7, 3 * BLOCK_SIZE)
  assert cluster.managers[0].borrow(7, 2)
  for _ in range(num_rounds):
    cluster.carry()
  return cluster


class _Waiting:
  """A life of a request, in which the first message of one kind waits."""

  def __init__(self, kind):
    self.kind = kind
    self.held = None

  def __call__(self, envelope):
    is_first = self.held is None and isinstance(envelope.body, self.kind)
    if is_first:
      self.held = envelope
    return [] if is_first else [envelope]

  def live(self):
    cluster = FakeCluster(
      3, _BLOCKS, interceptor=self, spill_slots=_SLOTS, has_standby=True
    )
    cluster.heartbeat()
    cluster.introduce()
    manager = cluster.managers[0]
    cluster.open(0, 7, 4 * BLOCK_SIZE)
    steps = (
      lambda: manager.borrow(7, 2),
      lambda: manager.reconcile(7),
      lambda: manager.recall_kvcache(7, 1, 1),
      cluster.tick,
    )
    for step in steps:
      step()
      cluster.settle()
      if self.held is not None:
        return cluster
    # Nobody says these by himself in so short a life.
    said = {
      MoveKvcache: MoveKvcache(uid=7, num_blocks=1, dst=2),
      RecallKvcache: RecallKvcache(uid=7, num_blocks=1, src=1, freeze_s=1.0),
      FullHeartbeatRequest: FullHeartbeatRequest(),
      Introduction: Introduction(),
    }
    is_introduction = self.kind is Introduction
    self.held = Envelope(
      sender=1 if is_introduction else GMANAGER,
      receiver=0,
      incarnation=1,
      seq=10**6,
      body=said[self.kind],
      responder=1 if is_introduction else 0,
      leader_epoch=0 if is_introduction else cluster.gmanager.epoch,
    )
    return cluster


@pytest.mark.parametrize("kind", kinds(Body))
def test_no_number_in_any_message_makes_a_manager_raise(kind):
  waiting = _Waiting(kind)
  cluster = waiting.live()
  assert isinstance(waiting.held.body, kind)
  num_refused = 0
  for path, value in places(waiting.held):
    for other in absurd(value):
      try:
        envelope = replaced(waiting.held, path, other)
      except ValueError:  # A grant of nothing cannot even be made.
        continue
      receiver = waiting.held.receiver
      manager = (
        cluster.managers[receiver]
        if isinstance(receiver, int)
        else cluster.gmanagers[receiver]
      )
      before = sum(manager.refused.values())
      manager.on_message(envelope)
      if sum(manager.refused.values()) > before:
        num_refused += 1
        continue
      for _ in range(3):
        cluster.tick()
        cluster.settle()
        cluster.check()
      waiting = _Waiting(kind)
      cluster = waiting.live()
  assert num_refused > 0


@hypothesis.settings(max_examples=400)
@hypothesis.given(
  envelopes=st.lists(ENVELOPES, min_size=1, max_size=3),
  num_rounds=st.integers(0, 4),
  data=st.data(),
)
def test_managers_refuse_what_they_cannot_use(envelopes, num_rounds, data):
  cluster = _borrowing_cluster(num_rounds)
  for envelope in envelopes:
    # Where the numbers fit, it gets as far as a message can.
    envelope = dataclasses.replace(
      envelope,
      sender=data.draw(st.sampled_from([1, 2, 50, GMANAGER])),
      incarnation=data.draw(st.integers(0, 2)),
      seq=data.draw(st.integers(0, 6)),
      receiver=data.draw(st.sampled_from([0, 0, 0, 1])),
      meant_for=data.draw(st.integers(0, 1)),
      responder=data.draw(st.integers(0, 1)),
    )
    if data.draw(st.booleans()):
      cluster.managers[0].on_message(envelope)
    else:
      cluster.gmanager.on_message(envelope)
    cluster.check()
    for manager in cluster.managers:
      for hosted in manager.hosted.versions():
        assert hosted.slot < _SLOTS


@pytest.mark.parametrize(
  ("sender", "body"),
  [
    (50, Reserve(uid=1, slot=SlotName(slot=0, epoch=1), num_blocks=1)),
    (GMANAGER, Reserve(uid=1, slot=SlotName(slot=0, epoch=1), num_blocks=1)),
    (1, Reserve(uid=1, slot=SlotName(slot=2, epoch=1), num_blocks=1)),
    (1, CandidatesRequest(num_blocks=1)),
    (
      GMANAGER,
      Candidates(
        rooms=(
          (1, 1),
          (0, 1),
        )
      ),
    ),
    (
      GMANAGER,
      Candidates(
        rooms=(
          (1, 1),
          (3, 1),
        )
      ),
    ),
  ],
)
def test_a_refused_message_changes_nothing_and_is_counted(sender, body):
  cluster = FakeCluster(3, _BLOCKS, spill_slots=_SLOTS)
  manager = cluster.managers[0]
  envelope = Envelope(
    sender=sender, receiver=0, incarnation=1, seq=1, body=body, meant_for=1
  )

  manager.on_message(envelope)

  assert manager.refused == {type(body).__name__: 1}
  assert manager.lent() == {}
  assert manager.drain_messages() == []
