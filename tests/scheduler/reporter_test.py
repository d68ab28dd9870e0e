import pytest

from infinite_llm.config import LendingConfig
from infinite_llm.scheduler.mailbox import Outbox
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  Heartbeat,
  MoveKvcache,
  RecallKvcache,
  RequestBlocks,
)
from infinite_llm.scheduler.reporter import Reporter
from infinite_llm.types import PoolCounts

_COUNTS = PoolCounts(used=0, free=9, hosted=0, reserved=0, total=9)


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture
def outbox(clock):
  return Outbox(0, 1, clock, 0.5)


@pytest.fixture
def reporter(outbox, clock):
  lending = LendingConfig(full_heartbeat_every=4, heartbeat_every_s=0.1)
  return Reporter(outbox, lending, clock, [GMANAGER, STANDBY])


def _state(lent=(), **holders):
  requests = tuple(
    RequestBlocks(uid=int(name[1:]), holders=((0, count),))
    for name, count in holders.items()
  )
  return Heartbeat(counts=_COUNTS, lendable=9, lent=lent, requests=requests)


def test_all_gmanagers_hear_the_same_under_one_number(reporter, outbox):
  reporter.tell(_state(r7=1))

  first, second = outbox.drain()
  assert (first.receiver, second.receiver) == (GMANAGER, STANDBY)
  assert first.seq == second.seq == 1
  assert first.body == second.body == _state(r7=1)


def test_a_change_names_what_differs_and_what_is_gone(reporter, outbox):
  reporter.tell(_state(lent=((1, 5), (2, 1), (3, 4)), r7=1, r8=2, r9=3))
  reporter.tell(_state(lent=((1, 5), (2, 3), (4, 1)), r7=1, r8=4, r6=1))

  change = outbox.drain()[-1].body
  assert change.base == 1
  assert change.lent == ((2, 3), (4, 1), (3, 0))
  assert change.requests == (
    RequestBlocks(uid=8, holders=((0, 4),)),
    RequestBlocks(uid=6, holders=((0, 1),)),
    RequestBlocks(uid=9, holders=()),
  )
  assert change.counts == _COUNTS


def test_now_and_then_everything_is_said(reporter, outbox):
  for _ in range(9):
    reporter.tell(_state(r7=1))

  bodies = [m.body for m in outbox.drain() if m.receiver == GMANAGER]
  assert [body.base for body in bodies] == [
    None, 1, 2, 3, None, 5, 6, 7, None
  ]  # fmt: skip
  assert [len(body.requests) for body in bodies] == [1, 0, 0, 0] * 2 + [1]


def test_everything_is_said_when_asked_for(reporter, outbox):
  reporter.tell(_state(r7=1))
  reporter.tell(_state(r7=1), is_full=True)
  reporter.tell(_state(r7=1))

  bases = [m.body.base for m in outbox.drain() if m.receiver == GMANAGER]
  assert bases == [None, None, 2]


def test_heartbeats_are_due_once_a_period(reporter, clock):
  assert reporter.is_due()
  reporter.tell(_state())
  clock.now = 0.05
  assert not reporter.is_due()
  clock.now = 0.1
  assert reporter.is_due()


def _word(sender, epoch, seq=1, body=None):
  return Envelope(
    sender=sender,
    receiver=0,
    incarnation=1,
    seq=seq,
    body=body or ClusterStatus(lendable=1),
    leader_epoch=epoch,
  )


def test_older_epochs_do_not_count(reporter):
  verdicts = [
    reporter.follow(_word(sender, epoch))
    for sender, epoch in (
      (GMANAGER, 2),
      (STANDBY, 1),
      (STANDBY, 3),
      (GMANAGER, 2),
      (STANDBY, 4),
      (GMANAGER, 6),
    )
  ]

  assert verdicts == [True, False, True, False, True, True]
  assert reporter.void == {"fenced": 2}
  assert reporter.leader_epoch == 6


def test_a_status_or_a_plan_counts_once_and_in_order(reporter):
  status = ClusterStatus(lendable=1)
  move = MoveKvcache(uid=7, num_blocks=1, dst=1)
  recall = RecallKvcache(uid=7, num_blocks=1, src=1, freeze_s=1.0)

  verdicts = [
    reporter.follow(_word(GMANAGER, epoch, seq, body))
    for epoch, seq, body in (
      (2, 5, status),
      (2, 5, status),
      (2, 4, status),
      (2, 4, move),  # Statuses and plans do not wait for each other.
      (2, 4, move),
      (2, 3, recall),
      (2, 6, recall),
      (2, 7, status),
      (4, 1, status),  # It numbers anew in its next life.
      (4, 1, move),
    )
  ]

  assert verdicts == [
    True, False, False, True, False, False, True, True, True, True
  ]  # fmt: skip
  assert reporter.void == {"overtaken": 4}


def test_a_question_for_everything_is_answered_each_time(reporter):
  question = _word(GMANAGER, 2, 1, FullHeartbeatRequest())
  assert [reporter.follow(question) for _ in range(2)] == [True, True]


def test_open_questions_go_to_the_new_leader_at_once(reporter, outbox):
  question = CandidatesRequest(num_blocks=1)
  outbox.ask(GMANAGER, question, None)
  assert [m.receiver for m in outbox.drain()] == [GMANAGER]

  reporter.follow(_word(STANDBY, 3))

  (again,) = outbox.drain()
  assert (again.receiver, again.seq, again.body) == (STANDBY, 1, question)
  outbox.ask(GMANAGER, question, None)
  (later,) = outbox.drain()
  assert (later.receiver, later.settled) == (STANDBY, 1)
