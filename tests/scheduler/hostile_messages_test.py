"""Well-formed messages that make no sense, in the middle of a borrow."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.errors import MessageError, Refusal
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Candidates,
  CandidatesRequest,
  Envelope,
  Reserve,
  SlotName,
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
    )
    managers = [cluster.managers[0], cluster.gmanager]
    try:
      data.draw(st.sampled_from(managers)).on_message(envelope)
    except MessageError:
      continue
    cluster.check()
    for manager in cluster.managers:
      for hosted in manager.hosted.versions():
        assert hosted.slot < _SLOTS


@pytest.mark.parametrize(
  ("sender", "body", "text"),
  [
    (50, "reserve", "sender must be an instance below 3; got 50"),
    (GMANAGER, "reserve", "sender must be an instance below 3; got 'gmanag"),
    (1, "far slot", "slot must be below 2; got 2"),
    (1, "question", "CandidatesRequest is for the gManager, not for instance"),
    (GMANAGER, "itself", "candidates must be other instances below 3; got 0"),
    (GMANAGER, "nobody", "candidates must be other instances below 3; got 3"),
  ],
)
def test_a_refusal_names_what_is_wrong_and_changes_nothing(sender, body, text):
  bodies = {
    "reserve": Reserve(uid=1, slot=SlotName(slot=0, epoch=1), num_blocks=1),
    "far slot": Reserve(uid=1, slot=SlotName(slot=2, epoch=1), num_blocks=1),
    "question": CandidatesRequest(num_blocks=1),
    "itself": Candidates(instances=(1, 0)),
    "nobody": Candidates(instances=(1, 3)),
  }
  cluster = FakeCluster(3, _BLOCKS, spill_slots=_SLOTS)
  manager = cluster.managers[0]
  envelope = Envelope(
    sender=sender, receiver=0, incarnation=1, seq=1, body=bodies[body]
  )

  with pytest.raises(MessageError, match=text) as caught:
    manager.on_message(envelope)

  assert caught.value.refusal in (Refusal.MISDIRECTED, Refusal.MALFORMED)
  assert manager.lent() == {}
  assert manager.drain_messages() == []
