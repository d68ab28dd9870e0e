"""Well-formed messages that make no sense, in the middle of a borrow."""

import contextlib
import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.errors import MessageError
from infinite_llm.scheduler.lease_messages import (
  Reserve,
  SlotName,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Candidates,
  CandidatesRequest,
  Envelope,
)
from tests.scheduler.any_message import ENVELOPES
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


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
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
      with contextlib.suppress(MessageError):
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
    (GMANAGER, Candidates(instances=(1, 0))),
    (GMANAGER, Candidates(instances=(1, 3))),
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
