import dataclasses

import pytest

from infinite_llm.scheduler.mailbox import Inbox, Outbox
from infinite_llm.scheduler.messages import (
  ANSWER_TO,
  Candidates,
  CandidatesRequest,
  Reply,
  Request,
)
from tests.scheduler.any_message import kinds

_ASK = CandidatesRequest(num_blocks=1)
_ANSWER = Candidates(rooms=())


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture
def outbox(clock):
  return Outbox(0, 2, clock, 0.5)


def _answer_to(request):
  return dataclasses.replace(
    request, sender=request.receiver, receiver=0, body=_ANSWER, settled=0
  )


def test_requests_are_numbered_and_sent_at_once(outbox):
  outbox.ask(1, _ASK, "a")
  outbox.ask(2, _ASK, "b")

  sent = outbox.drain()

  assert [(m.receiver, m.seq, m.incarnation) for m in sent] == [
    (1, 1, 2),
    (2, 2, 2),
  ]
  assert outbox.drain() == []


def test_a_request_is_sent_again_until_it_is_answered(outbox, clock):
  outbox.ask(1, _ASK, "a")
  (request,) = outbox.drain()
  clock.now = 0.4
  outbox.resend()
  assert outbox.drain() == []

  clock.now = 0.5
  outbox.resend()
  assert outbox.drain() == [request]
  outbox.resend()
  assert outbox.drain() == []

  assert outbox.find(_answer_to(request)).context == "a"
  outbox.end(request.seq)
  clock.now = 9.0
  outbox.resend()
  assert outbox.drain() == []


def test_an_answer_counts_once(outbox):
  outbox.ask(1, _ASK, "a")
  answer = _answer_to(*outbox.drain())

  assert outbox.find(answer) is not None
  outbox.end(answer.seq)
  assert outbox.find(answer) is None


@pytest.mark.parametrize(
  "change", [{"incarnation": 1}, {"seq": 2}, {"sender": 2}]
)
def test_an_answer_to_something_else_is_ignored(outbox, change):
  outbox.ask(1, _ASK, "a")
  answer = _answer_to(*outbox.drain())

  assert outbox.find(dataclasses.replace(answer, **change)) is None
  assert outbox.awaits("a")


def test_every_kind_of_request_has_a_kind_of_answer():
  assert set(ANSWER_TO) == set(kinds(Request))
  assert set(ANSWER_TO.values()) == set(kinds(Reply))


def test_a_request_given_up_is_not_sent_again(outbox, clock):
  outbox.ask(1, _ASK, "a")
  outbox.ask(1, _ASK, "b")
  first, _ = outbox.drain()
  outbox.give_up(lambda pending: pending.context == "a")
  clock.now = 1.0
  outbox.resend()

  assert [m.seq for m in outbox.drain()] == [2]
  assert not outbox.awaits("a")
  assert outbox.find(_answer_to(first)) is None


def test_messages_say_which_answers_are_awaited_of_their_receiver(outbox):
  outbox.ask(1, _ASK, "a")  # 1
  outbox.ask(2, _ASK, "b")  # 2
  outbox.ask(1, _ASK, "c")  # 3
  first, second, third = outbox.drain()
  assert [m.settled for m in (first, second, third)] == [1, 2, 1]

  outbox.end(first.seq)
  outbox.ask(1, _ASK, "d")  # 4: number 3 is still open

  assert outbox.drain()[0].settled == 3


def _request(seq, *, settled=1, incarnation=1, sender=0):
  outbox = Outbox(sender, incarnation, lambda: 0.0, 1.0)
  outbox.ask(1, _ASK, None)
  (envelope,) = outbox.drain()
  return dataclasses.replace(envelope, seq=seq, settled=settled)


class _Executor:
  """Counts how often it was asked; each answer differs."""

  def __init__(self):
    self.count = 0

  def __call__(self):
    self.count += 1
    return Candidates(rooms=((self.count, 1),))


def test_a_repeated_request_is_executed_once_and_answered_alike():
  inbox, execute = Inbox(), _Executor()

  first = inbox.answer(_request(1), execute)
  again = inbox.answer(_request(1), execute)

  assert first is again
  assert execute.count == 1


def test_reordered_requests_are_all_executed():
  inbox, execute = Inbox(), _Executor()

  for seq in (2, 1, 3):
    assert inbox.answer(_request(seq), execute) is not None

  assert execute.count == 3


def test_a_repetition_that_nobody_awaits_is_dropped():
  inbox, execute = Inbox(), _Executor()
  inbox.answer(_request(1), execute)
  inbox.answer(_request(2, settled=2), execute)

  assert inbox.answer(_request(1), execute) is None
  assert execute.count == 2


def test_senders_do_not_share_numbers():
  inbox, execute = Inbox(), _Executor()
  inbox.answer(_request(1, sender=0), execute)
  inbox.answer(_request(1, sender=2), execute)

  assert execute.count == 2


def test_a_new_incarnation_counts_from_the_start_and_ends_the_old_one():
  inbox, execute = Inbox(), _Executor()
  inbox.answer(_request(5, settled=5), execute)

  assert inbox.answer(_request(1, incarnation=2), execute) is not None
  assert inbox.answer(_request(6, settled=5), execute) is None
  assert execute.count == 2


def test_an_answer_that_takes_time_is_given_to_all_repetitions():
  inbox, execute = Inbox(), _Executor()
  request = _request(5)
  assert inbox.answer(request, lambda: None) is None
  assert inbox.answer(request, execute) is None  # not executed again

  assert inbox.later(request, _ANSWER)

  assert inbox.answer(request, execute) is _ANSWER
  assert execute.count == 0


def test_an_answer_that_comes_too_late_is_dropped():
  inbox = Inbox()
  request = _request(5)
  inbox.answer(request, lambda: None)
  inbox.answer(_request(6, settled=6), lambda: None)
  assert not inbox.later(request, _ANSWER)

  inbox.answer(_request(1, incarnation=2), lambda: None)
  assert not inbox.later(_request(6), _ANSWER)


def test_a_stranger_is_asked_again_when_it_is_known(outbox):
  outbox.ask(1, _ASK, "a")
  outbox.ask(2, _ASK, "b")
  assert [m.meant_for for m in outbox.drain()] == [0, 0]

  outbox.introduce(1, 3)

  assert [(m.seq, m.meant_for) for m in outbox.drain()] == [(1, 3)]
  outbox.ask(1, _ASK, "c")
  assert [m.meant_for for m in outbox.drain()] == [3]


def test_the_first_sending_is_remembered(outbox, clock):
  outbox.ask(1, _ASK, "a")
  (request,) = outbox.drain()
  clock.now = 3.0
  outbox.resend()

  pending = outbox.find(_answer_to(request))
  assert (pending.first_s, pending.sent_s) == (0.0, 3.0)
