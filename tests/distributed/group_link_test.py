"""The link between processes, with both ends in this one."""

import contextlib
import socket
import threading
import time
import types

import pytest

from infinite_llm.distributed.group_link import LeaderLink, MemberLink
from infinite_llm.distributed.group_messages import (
  Abort,
  Ask,
  Close,
  Hello,
  OutputNews,
  Outputs,
  Refused,
  Submit,
  Turn,
)
from infinite_llm.distributed.step_header import GroupWork
from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.errors import ConfigError, GroupError
from infinite_llm.sampling_params import SamplingParams

_TIMEOUT_S = 20.0
_SECRET = b"known to the whole group"


def options(**changed):
  return GrpcOptions(
    **{"listen": "127.0.0.1:0", "secret": _SECRET, "keepalive_s": 1.0} | changed
  )


def hello(process, **changed):
  values = {
    "process": process,
    "settings": (("config.seed", "0"),),
    "target": "127.0.0.1:1",
    "instances": (process,),
  }
  return Hello(**values | changed)


class Links:
  """A leader of two members; closes whatever was opened."""

  def __init__(self):
    self.leader = LeaderLink(options(), 2, self._admit)
    self.members = []

  def _admit(self, hello):
    return None if hello.settings[0][1] == "0" else "seed must be alike."

  def member(self, **changed) -> MemberLink:
    link = MemberLink(f"127.0.0.1:{self.leader.port}", options(**changed))
    self.members.append(link)
    return link

  def joined(self):
    for process in (1, 2):
      self.member().join(hello(process), _TIMEOUT_S)
    self.leader.await_members(_TIMEOUT_S)
    return self.leader, *self.members

  def close(self):
    self.leader.close()
    for member in self.members:
      member.close()


@pytest.fixture
def links():
  links = Links()
  yield links
  links.close()


def until(condition):
  deadline_s = time.monotonic() + _TIMEOUT_S
  while not condition():
    assert time.monotonic() < deadline_s
    time.sleep(0.005)


SUBMIT = Submit(
  uid=3,
  request_id="ünïcödé",
  instance=1,
  prompt=(1, 2, 3),
  sampling=SamplingParams(temperature=0.5, seed=7, stop=("Ende…",)),
)


class TestTalk:
  def test_the_leader_is_told_who_joined(self, links):
    links.member().join(hello(2), _TIMEOUT_S)
    links.member().join(hello(1, target="127.0.0.1:9"), _TIMEOUT_S)
    hellos = links.leader.await_members(_TIMEOUT_S)
    assert hellos == [hello(1, target="127.0.0.1:9"), hello(2)]

  def test_what_is_said_arrives_in_order_both_ways(self, links):
    leader, first, second = links.joined()
    turns = [
      Turn(number=n, work=GroupWork(decode=True, prefill_tokens=n))
      for n in range(1, 200)
    ]
    for turn in turns:
      leader.broadcast(turn)
    leader.send(1, SUBMIT)
    for member, more in ((first, [SUBMIT]), (second, [])):
      heard = [member.next(_TIMEOUT_S) for _ in (*turns, *more)]
      assert heard == [*turns, *more]
    asked = [
      Ask(
        number=n, work=GroupWork(check=True, exchange=((1, 1), (1 + n, 7 + n)))
      )
      for n in range(1, 200)
    ]
    for message in asked:
      second.send(message)
    heard = []
    until(lambda: heard.extend(leader.receive()) or len(heard) == len(asked))
    assert heard == [(2, message) for message in asked]

  def test_texts_may_have_any_characters(self, links):
    leader, first, _ = links.joined()
    news = OutputNews(
      uid=7,
      token_ids=(4,),
      pieces=("\u2603 \N{ROCKET}\n",),
      logprobs=(),
      finish_reason=None,
      error=None,
    )
    outputs = Outputs(
      uids=(8,), token_ids=(5,), texts=("\u2603",), news=(news,)
    )
    first.send(outputs)
    until(leader.has_mail)
    assert leader.receive() == [(1, outputs)]

  def test_columns_of_outputs_have_one_length(self):
    with pytest.raises(ValueError, match="must be of one length; got 2, 1 and"):
      Outputs(uids=(8, 9), token_ids=(5,), texts=("", ""))


class TestRefusals:
  def refused(self, links, first_words, **changed) -> str:
    member = links.member(**changed)
    member.join(first_words, _TIMEOUT_S)
    message = member.next(_TIMEOUT_S)
    assert isinstance(message, Refused)
    return message.reason

  def test_a_process_that_starts_twice(self, links):
    links.joined()
    reason = self.refused(links, hello(2))
    assert reason == "Process 2 has joined already."
    assert links.leader.lost is None

  def test_a_process_of_another_configuration(self, links):
    other = hello(1, settings=(("config.seed", "1"),))
    assert self.refused(links, other) == "seed must be alike."
    # The right one may still come.
    links.member().join(hello(1), _TIMEOUT_S)
    links.member().join(hello(2), _TIMEOUT_S)
    assert len(links.leader.await_members(_TIMEOUT_S)) == 2

  @pytest.mark.parametrize("process", [0, 3])
  def test_a_number_that_is_not_in_the_group(self, links, process):
    reason = self.refused(links, hello(process))
    assert reason == f"process must be in [1, 2]; got {process}."

  @pytest.mark.parametrize("secret", [None, b"known to another group"])
  def test_a_process_without_the_secret(self, links, secret):
    member = links.member(secret=secret)
    member.join(hello(1), _TIMEOUT_S)
    with pytest.raises(GroupError, match=r"Process 0 does not understand"):
      member.next(_TIMEOUT_S)
    with pytest.raises(GroupError, match=r"process\(es\) 1, 2 nothing"):
      links.leader.await_members(0.05)

  def test_one_that_does_not_begin_with_hello(self, links):
    member = links.member()
    member.send(Ask(number=1, work=GroupWork()))
    member.join(hello(1), _TIMEOUT_S)
    with pytest.raises(GroupError, match=r"must begin with Hello"):
      member.next(_TIMEOUT_S)


def unchecked(exchange) -> GroupWork:
  """What a process of another program might say."""
  work = GroupWork()
  object.__setattr__(work, "exchange", exchange)
  return work


@pytest.mark.parametrize(
  ("exchange", "rule"),
  [
    (((0, 1),), r"exchange\[0\]\[0\] must be an integer in \[1, "),
    (((1, 0),), r"exchange\[0\]\[1\] must be an integer in \[1, "),
    (((1, 2**31),), r"exchange\[0\]\[1\] must be an integer in \[1, "),
    (((1, True),), r"exchange\[0\]\[1\] must be an integer in \[1, "),
    (((1, 8), (2,)), r"exchange\[1\] must be a list of 2"),
    ((1, 2), r"exchange\[0\] must be a list of 2"),
    (((2, 1), (1, 1)), r"must have ascending shifts, from 1 on; got \(\(2"),
    (((1, 1), (1, 8)), r"must have ascending shifts, from 1 on; got \(\(1"),
  ],
)
def test_exchanges_that_make_no_header_are_refused(links, exchange, rule):
  leader, first, second = links.joined()
  second.send(Ask(number=1, work=unchecked(exchange)))
  until(lambda: leader.lost is not None)
  message = r"Process 2 sent what it must not: The message's body\.Ask\.work"
  with pytest.raises(GroupError, match=message + ".*" + rule):
    leader.receive()
  leader.broadcast(Turn(number=1, work=unchecked(exchange)))
  message = r"Process 0 sent what it must not: The message's body\.Turn\.work"
  with pytest.raises(GroupError, match=message + ".*" + rule):
    first.next(_TIMEOUT_S)


class Wire:
  """A TCP connection to a port through this process, which may be cut.

  Nobody hears of a cut: as of a host that lost its power.
  """

  def __init__(self, port: int):
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
    self._port = port
    self._ends: list[socket.socket] = []
    self._is_whole = threading.Event()
    self._is_whole.set()
    threading.Thread(target=self._serve, daemon=True).start()

  def cut(self):
    self._is_whole.clear()

  def close(self):
    for end in (self._listener, *self._ends):
      # What waits for it wakes up.
      with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
      end.close()

  def _serve(self):
    with contextlib.suppress(OSError):
      while True:
        near = self._listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", self._port))
        self._ends += (near, far)
        for ends in ((near, far), (far, near)):
          threading.Thread(target=self._pass, args=ends, daemon=True).start()

  def _pass(self, source, sink):
    with contextlib.suppress(OSError):
      while data := source.recv(2**16):
        if self._is_whole.is_set():
          sink.sendall(data)


@pytest.fixture(name="cut_off")
def _cut_off():
  """A leader and its member, and the wire between them."""
  leader = LeaderLink(options(keepalive_s=1.5), 1, lambda _: None)
  wire = Wire(leader.port)
  member = MemberLink(wire.target, options(keepalive_s=1.5))
  member.join(hello(1), _TIMEOUT_S)
  leader.await_members(_TIMEOUT_S)
  yield leader, member, wire
  wire.close()
  leader.close()
  member.close()


class TestSilence:
  @pytest.mark.parametrize("is_talking", [True, False])
  def test_both_ends_notice_it_long_before_a_minute(self, cut_off, is_talking):
    leader, member, wire = cut_off
    wire.cut()
    if is_talking:  # What waits to be answered is no sign of life.
      leader.broadcast(Turn(number=1, work=GroupWork()))
      member.send(Ask(number=1, work=GroupWork()))
    until(lambda: leader.lost is not None)
    until(lambda: member.lost is not None)
    assert leader.lost == "Process 1 is gone."
    assert member.lost == "Process 0 is gone."

  def test_whoever_has_nothing_to_say_is_still_there(self, cut_off):
    leader, member, _ = cut_off
    time.sleep(4.0)  # Longer than what is borne without an answer to a probe.
    assert leader.lost is None
    assert member.lost is None
    leader.broadcast(Close())
    assert member.next(_TIMEOUT_S) == Close()


class TestEnds:
  def joins(self, links, first_words) -> bool:
    """Whether the leader lets a process in: it says nothing against it."""
    member = links.member()
    member.join(first_words, _TIMEOUT_S)
    try:
      return not isinstance(member.next(0.5), Refused)
    except GroupError:
      return True

  def test_one_that_goes_before_all_are_there_may_come_again(self, links):
    first = links.member()
    first.join(hello(1), _TIMEOUT_S)
    first.close()

    until(lambda: self.joins(links, hello(1, target="127.0.0.1:2")))
    assert self.joins(links, hello(2))
    hellos = links.leader.await_members(_TIMEOUT_S)
    assert [each.target for each in hellos] == ["127.0.0.1:2", "127.0.0.1:1"]
    assert links.leader.lost is None

  def test_one_that_goes_as_it_is_looked_at_may_come_again(self):
    began, goes_on = threading.Event(), threading.Event()

    def admit(_):
      began.set()
      goes_on.wait(_TIMEOUT_S)

    leader = LeaderLink(options(), 1, admit)
    target = f"127.0.0.1:{leader.port}"
    first = MemberLink(target, options())
    first.join(hello(1), _TIMEOUT_S)
    began.wait(_TIMEOUT_S)
    first.close()
    time.sleep(0.5)  # The leader's side of gRPC has heard of it.
    goes_on.set()
    again = MemberLink(target, options())
    links = types.SimpleNamespace(member=lambda: again)
    assert self.joins(links, hello(1, target="127.0.0.1:2"))
    (told,) = leader.await_members(_TIMEOUT_S)
    assert told.target == "127.0.0.1:2"
    leader.close()
    again.close()

  def test_a_process_that_is_late_is_named(self, links):
    links.member().join(hello(1), _TIMEOUT_S)
    message = r"All 3 processes must start within 0.1 s; .*process\(es\) 2 "
    with pytest.raises(GroupError, match=message):
      links.leader.await_members(0.1)

  def test_nobody_leads(self):
    member = MemberLink("127.0.0.1:1", options())
    message = r"Process 1 found no process 0 at 127.0.0.1:1 within 0.3 s\."
    with pytest.raises(GroupError, match=message):
      member.join(hello(1), 0.3)
    member.close()

  def test_the_leader_notices_that_a_member_is_gone(self, links):
    leader, first, _ = links.joined()
    first.close()
    until(lambda: leader.lost is not None)
    with pytest.raises(GroupError, match=r"Process 1 is gone\."):
      leader.receive()

  def test_members_notice_that_the_leader_is_gone(self, links):
    leader, first, second = links.joined()
    leader.broadcast(Abort(request_id="last"))
    leader.broadcast(Close())
    leader.close()
    for member in (first, second):
      until(lambda member=member: member.lost is not None)
      # What it said before is not lost.
      assert member.receive() == [Abort(request_id="last"), Close()]
      with pytest.raises(GroupError, match=r"Process 0 is gone\."):
        member.receive()

  def test_an_address_that_cannot_be_listened_at(self):
    message = r"coordinator must be an address to serve at; got '203.0.113.1:9'"
    with pytest.raises(ConfigError, match=message):
      LeaderLink(options(listen="203.0.113.1:9"), 1, lambda _: None)
