"""Which header is agreed when, with the members' ends in this process."""

import collections
import re

import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.group_messages import Ask, Call, Ready, Turn
from infinite_llm.distributed.shared_order import LeaderOrder, MemberOrder
from infinite_llm.distributed.step_header import GroupWork, OwnOrder, StepHeader
from infinite_llm.errors import GroupError

CONFIG = engine_config(num_instances=5, exchange_blocks=8)
NOTHING = GroupWork()
DECODE = GroupWork(decode=True)
PREFILL = GroupWork(prefill_tokens=128)
CHECK = GroupWork(check=True)
NEAR = GroupWork(exchange=((1, 8),))
FAR = GroupWork(exchange=((2, 1), (3, 8)))
# No engine of `CONFIG` has the last program of any of these.
STRANGE = [((5, 1),), ((1, 8), (9, 8)), ((1, 1), (2, 7)), ((4, 16),)]


def said_of(process, exchange):
  return re.escape(
    f"Process {process} sent what it must not: exchange must have shifts in"
    f" [1, 5) and quotas out of 1, 8; got {exchange}."
  )


def header(number, work):
  return StepHeader(number=number, work=work, is_shared=True)


class LeaderEnd:
  def __init__(self):
    self.said = []

  def broadcast(self, message):
    self.said.append(message)

  def has_mail(self):
    return False


def leader(link=None, config=CONFIG, num_processes=1, clock=lambda: 0.0):
  """By default one whose members are always ready: only it can be late."""
  return LeaderOrder(link or LeaderEnd(), 1.0, config, num_processes, clock)


def agreed(order):
  """The next header once all are ready."""
  order.ready()
  return order.next()


class MemberEnd:
  def __init__(self):
    self.said = collections.deque()

  def send(self, message):
    self.said.append(message)

  def has_mail(self):
    return False


class TestGroupWork:
  def test_the_ceiling_has_the_shifts_of_both(self):
    both = GroupWork(exchange=((1, 8), (2, 1), (3, 8)))
    assert FAR | NEAR == NEAR | FAR == both | FAR == both

  def test_the_ceiling_has_the_larger_quota_of_each_shift(self):
    other = GroupWork(exchange=((2, 8), (3, 1), (4, 1)))
    both = GroupWork(exchange=((2, 8), (3, 8), (4, 1)))
    assert FAR | other == other | FAR == both | other == both

  @pytest.mark.parametrize("shifts", [(0,), (-1,), (2, 1), (1, 1)])
  def test_shifts_have_one_order(self, shifts):
    with pytest.raises(ValueError, match="must have ascending shifts, from 1"):
      GroupWork(exchange=tuple((shift, 8) for shift in shifts))

  @pytest.mark.parametrize("quota", [0, -8])
  def test_a_quota_takes_something(self, quota):
    with pytest.raises(ValueError, match="must have quotas of at least 1; got"):
      GroupWork(exchange=((1, 8), (2, quota)))


class TestLeader:
  def test_nothing_is_agreed_while_nobody_asks(self):
    link = LeaderEnd()
    order = leader(link)
    order.ask(NOTHING)
    order.on_ask(1, Ask(number=1, work=NOTHING))
    assert agreed(order) is None
    assert link.said == []

  def test_what_anybody_asks_for_is_in_the_header(self):
    link = LeaderEnd()
    order = leader(link)
    order.on_ask(2, Ask(number=1, work=DECODE))
    assert agreed(order) == header(1, DECODE)
    # What comes now waits for turn 2, and is joined there.
    order.on_ask(1, Ask(number=1, work=PREFILL))
    order.ask(CHECK)
    assert agreed(order) == header(1, DECODE)
    order.take(agreed(order))
    assert agreed(order) is None
    order.ask(CHECK)
    assert agreed(order) == header(2, CHECK | PREFILL)
    assert link.said == [
      Call(number=1),
      Turn(number=1, work=DECODE),
      Call(number=2),
      Turn(number=2, work=CHECK | PREFILL),
    ]

  def test_what_the_agreed_turn_brings_is_not_asked_for_again(self):
    order = leader()
    order.ask(DECODE)
    assert agreed(order) == header(1, DECODE)
    order.on_ask(1, Ask(number=1, work=DECODE))
    order.take(agreed(order))
    order.ask(NOTHING)
    assert agreed(order) is None

  def test_a_shift_that_the_agreed_turn_lacks_is_in_the_next(self):
    order = leader()
    order.ask(NEAR | FAR)
    assert agreed(order) == header(1, NEAR | FAR)
    order.on_ask(1, Ask(number=1, work=FAR))
    more = GroupWork(exchange=((3, 1), (4, 1)))
    order.on_ask(2, Ask(number=1, work=more))
    order.take(agreed(order))
    order.ask(NOTHING)
    assert agreed(order) == header(2, more)

  def test_a_larger_quota_than_the_agreed_one_is_in_the_next(self):
    order = leader()
    order.ask(FAR)
    assert agreed(order) == header(1, FAR)
    larger, smaller = (
      GroupWork(exchange=((s, q),)) for s, q in ((2, 8), (3, 1))
    )
    order.on_ask(1, Ask(number=1, work=larger))
    order.on_ask(2, Ask(number=1, work=smaller))
    assert agreed(order) == header(1, FAR)
    order.take(agreed(order))
    order.ask(NOTHING)
    assert agreed(order) == header(2, larger)

  def test_of_several_quotas_for_a_shift_the_larger_one_is_agreed_on(self):
    link = LeaderEnd()
    order = leader(link)
    order.ask(DECODE)
    assert agreed(order) == header(1, DECODE)
    order.on_ask(1, Ask(number=1, work=GroupWork(exchange=((2, 8), (4, 1)))))
    order.on_ask(2, Ask(number=1, work=GroupWork(exchange=((2, 1), (4, 8)))))
    order.take(agreed(order))
    order.ask(FAR)
    both = GroupWork(exchange=((2, 8), (3, 8), (4, 8)))
    assert agreed(order) == header(2, both)
    assert link.said[2:] == [Call(number=2), Turn(number=2, work=both)]

  @pytest.mark.parametrize("exchange", STRANGE)
  def test_exchanges_that_nobody_has_compiled_are_refused(self, exchange):
    link = LeaderEnd()
    order = leader(link)
    with pytest.raises(GroupError, match=said_of(3, exchange)):
      order.on_ask(3, Ask(number=1, work=GroupWork(exchange=exchange)))
    order.ask(NOTHING)
    assert agreed(order) is None
    assert link.said == []

  def test_that_holds_for_a_turn_that_the_leader_has_taken(self):
    order = leader()
    order.ask(DECODE)
    order.take(agreed(order))
    order.ask(NOTHING)
    order.on_ask(1, Ask(number=1, work=DECODE))
    assert agreed(order) is None
    order.on_ask(1, Ask(number=2, work=DECODE))
    assert agreed(order) == header(2, DECODE)

  def test_a_member_may_want_nothing_any_more(self):
    order = leader()
    order.ask(DECODE)
    assert agreed(order) == header(1, DECODE)
    order.on_ask(1, Ask(number=1, work=PREFILL))
    order.on_ask(1, Ask(number=1, work=NOTHING))
    order.take(agreed(order))
    order.ask(NOTHING)
    assert agreed(order) is None

  def test_the_next_header_is_there_while_a_turn_runs(self):
    order = leader()
    order.ask(DECODE)
    order.take(agreed(order))
    order.ask(DECODE)
    assert agreed(order) == header(2, DECODE)
    assert order.next_number == 2

  def test_a_turn_begins_when_all_are_ready(self):
    link = LeaderEnd()
    order = leader(link, num_processes=3)
    order.on_ready(1, Ready(number=1))  # Of a call that never was.
    assert not order.is_called
    order.on_ask(1, Ask(number=1, work=DECODE))
    assert order.is_called
    assert link.said == [Call(number=1)]
    order.ready()
    order.on_ready(1, Ready(number=1))
    order.on_ready(1, Ready(number=1))
    assert order.next() is None
    order.ask(CHECK)  # Whoever asks by now is in it.
    order.on_ready(2, Ready(number=1))
    assert order.next() == header(1, DECODE | CHECK)
    assert not order.is_called

    order.on_ask(2, Ask(number=2, work=PREFILL))
    order.take(order.next())
    order.ask(NOTHING)
    assert order.is_called
    order.on_ready(1, Ready(number=1))  # Too late to count for the next one.
    order.on_ready(2, Ready(number=2))
    order.ready()
    assert order.next() is None
    order.on_ready(1, Ready(number=2))
    assert order.next() == header(2, PREFILL)

  def test_a_process_that_is_never_ready_ends_the_group(self):
    now_s = 0.0
    order = leader(num_processes=4, clock=lambda: now_s)
    now_s = 5.0
    order.on_ask(1, Ask(number=1, work=DECODE))
    order.on_ready(2, Ready(number=1))
    now_s = 6.0
    assert order.next() is None
    now_s = 6.1
    with pytest.raises(
      GroupError,
      match=r"within 1 s; process\(es\) 0, 1, 3 are not ready for turn 1\.",
    ):
      order.next()

  def test_a_called_turn_that_nobody_needs_any_more_is_empty(self):
    order = leader(num_processes=2)
    order.on_ask(1, Ask(number=1, work=DECODE))
    order.on_ask(1, Ask(number=1, work=NOTHING))
    order.on_ready(1, Ready(number=1))
    assert agreed(order) == header(1, NOTHING)


class TestMember:
  def test_news_are_said_once_a_turn(self):
    link = MemberEnd()
    order = MemberOrder(link, 1.0, CONFIG)
    for work in (NOTHING, NOTHING, DECODE, DECODE, NOTHING, NOTHING):
      order.ask(work)
    order.on_turn(Turn(number=1, work=DECODE))
    order.take(order.next())
    for work in (NOTHING, DECODE, DECODE):
      order.ask(work)
    order.on_turn(Turn(number=2, work=DECODE))
    order.take(order.next())
    order.ask(DECODE)
    assert list(link.said) == [
      Ask(number=1, work=NOTHING),
      Ask(number=1, work=DECODE),
      Ask(number=1, work=NOTHING),
      Ask(number=2, work=DECODE),
      Ask(number=3, work=DECODE),
    ]

  def test_it_says_once_that_it_is_ready(self):
    link = MemberEnd()
    order = MemberOrder(link, 1.0, CONFIG)
    order.ready()
    assert not order.is_called
    order.on_call(Call(number=1))
    assert order.is_called
    order.ready()
    order.ready()
    order.on_turn(Turn(number=1, work=DECODE))
    order.on_call(Call(number=2))  # Before it has taken turn 1.
    order.ready()
    assert not order.is_called
    order.take(order.next())
    assert order.is_called
    order.ready()
    assert list(link.said) == [Ready(number=1), Ready(number=2)]

  def test_turns_are_taken_in_order(self):
    order = MemberOrder(MemberEnd(), 1.0, CONFIG)
    assert order.next() is None
    order.on_turn(Turn(number=1, work=DECODE))
    order.on_turn(Turn(number=2, work=CHECK))
    assert order.next() == order.next() == header(1, DECODE)
    order.take(order.next())
    assert order.next_number == 2
    assert order.next() == header(2, CHECK)

  @pytest.mark.parametrize("exchange", STRANGE)
  def test_exchanges_that_nobody_has_compiled_are_refused(self, exchange):
    order = MemberOrder(MemberEnd(), 1.0, CONFIG)
    with pytest.raises(GroupError, match=said_of(0, exchange)):
      order.on_turn(Turn(number=1, work=GroupWork(exchange=exchange)))
    assert order.next() is None


class TestPrefillSteps:
  SAID = "sent .* prefill_tokens must be one of 0, 128, 1024; got 64"

  def test_what_no_process_has_compiled_is_refused(self):
    work = GroupWork(prefill_tokens=64)
    with pytest.raises(GroupError, match=f"Process 3 {self.SAID}"):
      leader().on_ask(3, Ask(number=1, work=work))
    order = MemberOrder(MemberEnd(), 1.0, CONFIG)
    with pytest.raises(GroupError, match=f"Process 0 {self.SAID}"):
      order.on_turn(Turn(number=1, work=work))
    assert order.next() is None


class TestLayeredSteps:
  CONFIG = engine_config(
    num_instances=5,
    prefill_buckets=(64, 256),
    host_blocks=9,
    host_attention=True,
  )

  def test_the_larger_chunk_counts(self):
    work = GroupWork(layered_tokens=1) | GroupWork(layered_tokens=256)
    assert work == GroupWork(layered_tokens=256)

  @pytest.mark.parametrize("tokens", [1, 256])
  def test_what_is_compiled_is_launched(self, tokens):
    order = MemberOrder(MemberEnd(), 1.0, self.CONFIG)
    work = GroupWork(layered_tokens=tokens)
    order.on_turn(Turn(number=1, work=work))
    assert order.next() == header(1, work)

  @pytest.mark.parametrize(
    ("config", "tokens", "said"),
    [(CONFIG, 64, "0, 1, 256; got 64."), (None, 1, "one of 0; got 1.")],
  )
  def test_what_is_not_compiled_is_refused(self, config, tokens, said):
    message = Ask(number=1, work=GroupWork(layered_tokens=tokens))
    order = leader(config=config or CONFIG)
    with pytest.raises(
      GroupError, match=f"Process 3 sent .* layered_tokens must be .*{said}"
    ):
      order.on_ask(3, message)
    assert order.next() is None


def test_a_process_that_is_alone_takes_any_turn_at_once():
  order = OwnOrder(1024)
  order.ask(FAR)
  turn = order.next()
  assert (turn.number, turn.is_shared) == (1, False)
  assert turn.work == GroupWork(
    exchange=((2, 1), (3, 8)), check=True, decode=True, prefill_tokens=1024
  )
  order.take(turn)
  assert order.next().number == order.next_number == 2
  order.ask(NOTHING)
  assert order.next().work.exchange == ()
  assert not order.has_call()
