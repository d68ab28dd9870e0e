"""The sequential model of leases, operation by operation."""

import dataclasses

import pytest

from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Grant,
  HostedEntry,
  Release,
  ReleaseReply,
  Renew,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.messages import Envelope
from infinite_llm.simulator.lease_history import LeaseHistory
from infinite_llm.simulator.lease_model import ModelLease, Operation
from infinite_llm.simulator.violation import ViolationError

_SLOT = SlotName(slot=0, epoch=1)
_GRANTS = (Grant(block_id=4, epoch=10), Grant(block_id=5, epoch=11))
_ENTRIES = tuple(
  HostedEntry(logical_id=i, grant=grant) for i, grant in enumerate(_GRANTS)
)
_RESERVE = Reserve(uid=7, slot=_SLOT, num_blocks=2)
_COMMIT = Commit(uid=7, slot=_SLOT, entries=_ENTRIES)


class Creditor:
  """Instance 1; what it hears comes from instance 0."""

  def __init__(self, max_lent_blocks=None):
    self.history = LeaseHistory(
      1, 3, lease_s=10.0, max_lent_blocks=max_lent_blocks, now_s=0.0
    )
    self.seq = 0

  def hear(self, body, now_s=0.0, incarnation=1, seq=None, meant_for=3):
    self.seq += 1
    envelope = Envelope(
      sender=0,
      receiver=1,
      incarnation=incarnation,
      seq=seq or self.seq,
      body=body,
      meant_for=meant_for,
    )
    self.history.on_heard(envelope, now_s)
    return envelope

  def answer(self, request, body):
    reply = dataclasses.replace(
      request, sender=1, receiver=0, body=body, responder=3
    )
    self.history.on_answered(request, reply, 0.0)

  def lend(self):
    self.answer(self.hear(_RESERVE), ReserveReply(grants=_GRANTS))
    self.answer(self.hear(_COMMIT), CommitReply(table_version=0))


@pytest.fixture
def creditor():
  return Creditor()


def test_a_lease_lives_from_its_reservation_to_its_release(creditor):
  creditor.lend()
  creditor.history.check_books({0: 2})
  assert creditor.history.leases == {
    4: ModelLease(0, 1, 7, _SLOT, 10, is_hosted=True),
    5: ModelLease(0, 1, 7, _SLOT, 11, is_hosted=True),
  }

  # A grant of another epoch is given back already.
  grants = (_GRANTS[0], Grant(block_id=5, epoch=99))
  release = creditor.hear(Release(slot=_SLOT, grants=grants))
  creditor.answer(release, ReleaseReply(table_version=1))
  creditor.history.check_books({0: 1})
  assert list(creditor.history.operations) == [
    Operation(0.0, 1, 0, 1, "reserve", ((4, 10), (5, 11))),
    Operation(0.0, 1, 0, 1, "commit", ((4, 10), (5, 11))),
    Operation(0.0, 1, 0, 1, "release", ((4, 10),)),
  ]


def test_only_a_hosted_lease_of_its_owner_may_be_read(creditor):
  creditor.answer(creditor.hear(_RESERVE), ReserveReply(grants=_GRANTS))
  assert creditor.history.lease(0, 1, 4) is None
  creditor.answer(creditor.hear(_COMMIT), CommitReply(table_version=0))
  assert creditor.history.lease(0, 1, 4).epoch == 10
  assert creditor.history.lease(0, 2, 4) is None
  assert creditor.history.lease(2, 1, 4) is None


def test_silence_for_a_lease_ends_all(creditor):
  creditor.lend()
  for now_s in (4.0, 8.0, 9.9):
    creditor.history.on_ticked(now_s)
  creditor.history.check_books({0: 2})
  creditor.history.on_ticked(10.0)
  creditor.history.check_books({})
  with pytest.raises(ViolationError, match=r"lent \{0: 2\}, not \{\}"):
    creditor.history.check_books({0: 2})


def test_a_renewal_and_a_sleep_of_the_creditor_prolong_leases(creditor):
  creditor.lend()
  creditor.history.on_ticked(4.0)
  creditor.hear(Renew(sent_s=0.0), now_s=4.0)
  for now_s in (8.0, 12.0):
    creditor.history.on_ticked(now_s)
  creditor.history.check_books({0: 2})
  creditor.history.on_ticked(30.0)  # It slept for more than half a lease.
  creditor.history.check_books({0: 2})


def test_a_later_life_of_the_owner_ends_the_leases_of_the_earlier(creditor):
  creditor.lend()
  creditor.hear(Renew(sent_s=0.0), incarnation=2)
  creditor.history.check_books({})


def _refused(creditor, match, request, reply):
  with pytest.raises(ViolationError, match=match):
    creditor.answer(request, reply)


def test_a_repetition_gets_the_same_answer(creditor):
  reserve = creditor.hear(_RESERVE)
  creditor.answer(reserve, ReserveReply(grants=_GRANTS))
  creditor.answer(reserve, ReserveReply(grants=_GRANTS))
  creditor.history.check_books({0: 2})
  _refused(creditor, "its repetition", reserve, ReserveReply(grants=()))


def test_an_rblock_is_lent_once(creditor):
  creditor.lend()
  again = ReserveReply(grants=(Grant(block_id=4, epoch=12),))
  _refused(creditor, "lent already", creditor.hear(_RESERVE), again)


def test_an_epoch_is_used_once(creditor):
  creditor.lend()
  old = ReserveReply(grants=(Grant(block_id=6, epoch=11),))
  _refused(creditor, "not after 11", creditor.hear(_RESERVE), old)


def test_the_cap_holds():
  creditor = Creditor(max_lent_blocks=1)
  reply = ReserveReply(grants=_GRANTS)
  _refused(creditor, "its cap 1", creditor.hear(_RESERVE), reply)


def test_nobody_gets_more_than_asked_for(creditor):
  request = creditor.hear(Reserve(uid=7, slot=_SLOT, num_blocks=1))
  _refused(creditor, "granted", request, ReserveReply(grants=_GRANTS))


def test_only_what_was_reserved_is_hosted(creditor):
  reply = CommitReply(table_version=0)
  _refused(creditor, "never reserved", creditor.hear(_COMMIT), reply)
  creditor.answer(creditor.hear(_RESERVE), ReserveReply(grants=_GRANTS))
  reply = CommitReply(table_version=None)
  _refused(creditor, "refused to host", creditor.hear(_COMMIT), reply)


def test_a_sync_tells_just_what_is_missing(creditor):
  creditor.lend()
  unknown = HostedEntry(logical_id=2, grant=Grant(block_id=6, epoch=12))
  sync = Sync(uid=7, slot=_SLOT, entries=(*_ENTRIES, unknown))
  creditor.answer(
    creditor.hear(sync), SyncReply(table_version=None, missing=(2,))
  )
  wrong = SyncReply(table_version=1, missing=())
  _refused(creditor, r"lacks \(\), not \(2,\)", creditor.hear(sync), wrong)


def test_the_dead_and_the_misdirected_are_not_executed(creditor):
  late = creditor.hear(_RESERVE)
  creditor.hear(Renew(sent_s=0.0), incarnation=2)
  reply = ReserveReply(grants=_GRANTS)
  _refused(creditor, "dead incarnation of 0", late, reply)
  strange = creditor.hear(_RESERVE, incarnation=2, meant_for=2)
  _refused(creditor, "meant for incarnation 2", strange, reply)
