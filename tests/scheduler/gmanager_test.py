import pytest

from infinite_llm.errors import MessageError
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.ledger import LedgerLine
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  Heartbeat,
  ReserveReply,
)
from infinite_llm.types import PoolCounts


def _envelope(sender, seq, body, incarnation=1):
  return Envelope(
    sender=sender,
    receiver=GMANAGER,
    incarnation=incarnation,
    seq=seq,
    body=body,
  )


def _heartbeat(sender, seq, lendable, *, lent=(), incarnation=1):
  counts = PoolCounts(
    used=0, free=lendable, hosted=9 - lendable, reserved=0, total=9
  )
  body = Heartbeat(counts=counts, lendable=lendable, lent=lent, borrowed=())
  return _envelope(sender, seq, body, incarnation)


def _drain(gmanager):
  return [(m.receiver, m.body) for m in gmanager.drain_messages()]


def test_heartbeats_fill_the_ledger():
  gmanager = GManager("borrow")
  gmanager.on_message(_heartbeat(1, 1, 4, lent=((0, 5),)))
  gmanager.on_message(_heartbeat(0, 1, 9))

  assert gmanager.view().lines == (
    LedgerLine(instance=0, free=9, lendable=9, debts=()),
    LedgerLine(instance=1, free=4, lendable=4, debts=((0, 5),)),
  )


def test_a_newcomer_is_news_to_everybody_else_only_the_sender_is_told():
  gmanager = GManager("borrow")
  gmanager.on_message(_heartbeat(0, 1, 9))
  assert _drain(gmanager) == [(0, ClusterStatus(lendable=((0, 9),)))]

  gmanager.on_message(_heartbeat(1, 1, 4))
  status = ClusterStatus(lendable=((0, 9), (1, 4)))
  assert _drain(gmanager) == [(0, status), (1, status)]

  gmanager.on_message(_heartbeat(1, 2, 3))
  assert _drain(gmanager) == [(1, ClusterStatus(lendable=((0, 9), (1, 3))))]


@pytest.mark.parametrize(
  ("seq", "incarnation", "lendable"), [(1, 1, 5), (3, 1, 8), (1, 2, 8)]
)
def test_an_older_heartbeat_changes_nothing(seq, incarnation, lendable):
  gmanager = GManager("borrow")
  gmanager.on_message(_heartbeat(0, 2, 5))
  gmanager.on_message(_heartbeat(0, seq, 8, incarnation=incarnation))

  assert gmanager.view().lines[0].lendable == lendable


def test_candidates_answer_the_request_they_were_asked_for_with():
  gmanager = GManager("borrow")
  for instance, lendable in ((0, 0), (1, 4), (2, 9)):
    gmanager.on_message(_heartbeat(instance, 1, lendable))
  gmanager.drain_messages()

  gmanager.on_message(
    _envelope(0, 7, CandidatesRequest(num_blocks=3), incarnation=2)
  )

  (answer,) = gmanager.drain_messages()
  assert answer == Envelope(
    sender=GMANAGER,
    receiver=0,
    incarnation=2,
    seq=7,
    body=Candidates(instances=(2, 1)),
  )


def test_the_static_policy_proposes_nobody():
  gmanager = GManager("static")
  gmanager.on_message(_heartbeat(1, 1, 9))
  gmanager.drain_messages()

  gmanager.on_message(_envelope(0, 7, CandidatesRequest(num_blocks=3)))

  assert _drain(gmanager) == [(0, Candidates(instances=()))]


def test_what_creditors_say_to_debtors_is_not_for_the_gmanager():
  with pytest.raises(
    MessageError, match=r"ReserveReply of instance 0 is not for the gManager"
  ):
    GManager("borrow").on_message(_envelope(0, 1, ReserveReply(grants=())))
