"""Nonsense in the middle of everything: managers refuse and count it.

The machine of `lending_machine_test.py` goes on as usual while somebody sends
messages that were made up, or that were said once and are said again with other
numbers, or to somebody else. What passes for sane may take leases away, so
requests may lose KV, which a proof then finds; but no manager raises, books
stay right, and what is refused changes nothing.
"""

import collections
import contextlib
import dataclasses

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from infinite_llm.scheduler.messages import GMANAGER, Envelope
from tests.scheduler.any_message import ENVELOPES, absurd, places, replaced
from tests.scheduler.lending_machine_test import LendingMachine

_INSTANCES = 3


class HostileMachine(LendingMachine):
  """Somebody talks nonsense; only what holds all the same is checked."""

  def __init__(self):
    super().__init__()
    self.said = {}
    self.num_said = 0

  def _on_wire(self, envelope):
    kind = type(envelope.body).__name__
    self.said.setdefault(kind, collections.deque(maxlen=4)).append(envelope)
    return super()._on_wire(envelope)

  @stateful.precondition(lambda self: self.said)
  @stateful.rule(data=st.data(), count=st.integers(1, 8))
  def say_something_else(self, data, count):
    """What was said lately is said anew, with other numbers."""
    for _ in range(count):
      envelope = self._heard_before(data)
      if data.draw(st.booleans()):
        envelope = self._as_new(envelope)
      for _ in range(data.draw(st.integers(1, 2))):
        # Half of them in the body, whose fields are a few of all.
        start = ("body",) if data.draw(st.booleans()) else ()
        path, value = data.draw(st.sampled_from(places(envelope, start)))
        other = data.draw(st.sampled_from(absurd(value)))
        # A grant of nothing cannot even be made.
        with contextlib.suppress(ValueError):
          envelope = replaced(envelope, path, other)
      self._say(data, envelope)

  @stateful.precondition(lambda self: self.said)
  @stateful.rule(data=st.data())
  def put_words_into_another_mouth(self, data):
    """The body of one message in the envelope of another."""
    envelope = self._heard_before(data)
    body = self._heard_before(data).body
    self._say(data, dataclasses.replace(self._as_new(envelope), body=body))

  def _heard_before(self, data):
    """Something that was said lately, of any kind alike."""
    kind = data.draw(st.sampled_from(sorted(self.said)))
    return data.draw(st.sampled_from(tuple(self.said[kind])))

  def _as_new(self, envelope):
    """No repetition of what was heard: requests are executed."""
    self.num_said += 1
    return dataclasses.replace(envelope, seq=10**6 + self.num_said)

  @stateful.rule(data=st.data(), envelope=ENVELOPES)
  def make_something_up(self, data, envelope):
    addresses = st.sampled_from((*range(_INSTANCES), 50, GMANAGER))
    changes = {
      "sender": data.draw(addresses),
      "incarnation": data.draw(st.integers(0, 2)),
      "seq": data.draw(st.integers(0, 9)),
      "settled": 0,
      "meant_for": data.draw(st.integers(0, 2)),
      "responder": data.draw(st.integers(0, 2)),
      "leader_epoch": data.draw(st.sampled_from((0, 2, 3, 2**32 - 1))),
    }
    self._say(data, dataclasses.replace(envelope, **changes))

  def _say(self, data, envelope: Envelope):
    """Hands a message to somebody, mostly to whom it is for."""
    heard = (*self.cluster.managers, self.cluster.gmanager)
    addressed = [
      manager
      for address, manager in zip((*range(3), GMANAGER), heard, strict=True)
      if address == envelope.receiver
    ]
    manager = data.draw(st.sampled_from((*addressed * 6, *heard)))
    self.cluster.carry()
    refused, before = sum(manager.refused.values()), self._books(manager)
    manager.on_message(envelope)
    is_refused = sum(manager.refused.values()) > refused
    assert sum(manager.refused.values()) - refused == is_refused
    if is_refused:
      assert self._books(manager) == before
      assert manager.drain_messages() == []

  def _books(self, manager):
    if manager is self.cluster.gmanager:
      return manager.view(), manager.epoch, manager.is_leader
    return (
      manager.counts(),
      manager.lent(),
      manager.borrowed(),
      manager.hosted.generation,
      manager.lendable_elsewhere(),
      manager.is_frozen,
      manager.num_free_slots,
    )

  def _can_be_proved(self, uid):
    return self.cluster.covers(self.owner[uid], uid, self.cluster.proved[uid])

  @stateful.invariant()
  def books_are_right(self):
    self.cluster.carry()
    self.cluster.check()
    for instance, manager in enumerate(self.cluster.managers):
      held = [
        (location.instance, location.block_id)
        for uid, home in self.owner.items()
        if home == instance
        for location in self._locations(uid)
        if location.instance == instance
      ]
      assert len(set(held)) == len(held)
      for _, block_id in held:
        assert manager.pool.block(block_id).owner == instance

  def teardown(self):
    """All requests end, and nobody raises while time passes."""
    for uid, instance in self.swapped_out.items():
      self.cluster.managers[instance].swapping.drop(uid)
    for uid, instance in self.owner.items():
      self.cluster.managers[instance].close(uid)
    for _ in range(12):
      self.cluster.tick()
      self.come_to_rest()
    for manager in self.cluster.managers:
      counts = manager.counts()
      assert counts.used == 0
      # What is left is held for others, and nothing is lost from count.
      assert counts.hosted + counts.reserved == sum(manager.lent().values())


TestHostileMachine = HostileMachine.TestCase
TestHostileMachine.settings = hypothesis.settings(
  max_examples=150,
  stateful_step_count=50,
)
