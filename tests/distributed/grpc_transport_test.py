import dataclasses
import math
import threading
import time

import grpc
import pytest

from infinite_llm.distributed.transport.base import Transport
from infinite_llm.distributed.transport.grpc_link import METHOD
from infinite_llm.distributed.transport.grpc_options import (
  GrpcOptions,
  TlsFiles,
)
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.errors import (
  ConfigError,
  InvariantError,
  MessageError,
  Refusal,
)
from infinite_llm.scheduler.lease_messages import (
  Commit,
  Grant,
  HostedEntry,
  SlotName,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
)
from infinite_llm.scheduler.wire import VERSION, WireCodec
from tests.distributed.certificates import Authority

_PATIENCE_S = 30.0
_SECRET = b"sixteen bytes or"


def _message(seq, receiver=1, sender=0):
  return Envelope(
    sender=sender,
    receiver=receiver,
    incarnation=1,
    seq=seq,
    body=CandidatesRequest(num_blocks=seq),
  )


def _status(seq, receiver=1):
  body = ClusterStatus(lendable=seq)
  return dataclasses.replace(_message(seq, receiver), body=body)


def _long_message(num_entries):
  grant = Grant(block_id=1, epoch=1)
  body = Commit(
    uid=1,
    slot=SlotName(slot=0, epoch=1),
    entries=(HostedEntry(logical_id=0, grant=grant),) * num_entries,
  )
  return dataclasses.replace(_message(1), body=body)


def _eventually(condition):
  deadline_s = time.monotonic() + _PATIENCE_S
  while not condition():
    assert time.monotonic() < deadline_s, "It never came to that."
    time.sleep(0.002)


class _Process:
  """A transport, and what its addresses heard."""

  def __init__(self, *addresses, listen="127.0.0.1:0", **options):
    options = {"min_backoff_s": 0.01, "max_backoff_s": 0.05} | options
    self.transport = GrpcTransport(GrpcOptions(listen=listen, **options))
    self.addresses = addresses
    self.heard = []
    for address in addresses:
      self.transport.register(
        address, lambda m, a=address: self.heard.append((a, m.seq))
      )

  @property
  def target(self):
    return f"127.0.0.1:{self.transport.port}"

  @property
  def counters(self):
    return self.transport.counters()

  def hear(self, count):
    """Delivers until so many messages were heard, and returns them."""

    def has_heard():
      self.transport.deliver()
      return len(self.heard) >= count

    _eventually(has_heard)
    return self.heard


@pytest.fixture
def start():
  """Makes processes that know each other; all their threads must end."""
  threads = set(threading.enumerate())
  processes = []

  def start(*addresses, **options):
    process = _Process(*addresses, **options)
    for other in processes:
      for address in other.addresses:
        process.transport.connect(address, other.target)
      for address in process.addresses:
        other.transport.connect(address, process.target)
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.transport.close()
  assert set(threading.enumerate()) == threads


@pytest.fixture
def raw_call():
  """Sends any bytes as a call, as somebody else's program might."""
  channels = []

  def call(process, frame, method=METHOD):
    channel = grpc.insecure_channel(
      process.target, [("grpc.use_local_subchannel_pool", 1)]
    )
    channels.append(channel)
    return channel.unary_unary(method)(frame, timeout=_PATIENCE_S)

  yield call
  for channel in channels:
    channel.close()


def test_messages_arrive_at_the_address_they_are_for(start):
  one, other = start(0), start(1, GMANAGER)
  transport: Transport = one.transport
  transport.send(_message(1, receiver=1))
  transport.send(_message(2, receiver=GMANAGER))
  other.transport.send(_message(3, receiver=0, sender=1))

  assert other.hear(2) == [(1, 1), (GMANAGER, 2)]
  assert one.hear(1) == [(0, 3)]
  _eventually(lambda: one.counters.sent == 2)
  assert one.counters.delivered == 1


def test_handlers_run_only_where_messages_are_delivered(start):
  one, other = start(0), start(1)
  threads = []
  other.transport.register(1, lambda m: threads.append(threading.get_ident()))
  one.transport.send(_message(1))
  _eventually(lambda: one.counters.sent == 1)
  assert threads == []

  assert other.transport.deliver() == 1
  assert threads == [threading.get_ident()]
  assert other.transport.deliver() == 0


def test_waiting_ends_when_a_message_arrives(start):
  one, other = start(0), start(1)
  assert not other.transport.wait(0.0)

  one.transport.send(_message(1))
  assert other.transport.wait(_PATIENCE_S)
  assert other.transport.deliver() == 1


def test_addresses_of_one_process_need_no_network(start):
  process = start(0, 1)
  process.transport.send(_message(1))

  assert process.heard == []
  assert process.transport.deliver() == 1
  assert process.heard == [(1, 1)]
  assert process.counters.sent == 0


def test_a_message_sent_meanwhile_is_delivered_next_time(start):
  process = start(0, 1)
  process.transport.register(1, process.transport.send)
  process.transport.send(_message(1))

  assert process.transport.deliver() == 1
  assert process.transport.deliver() == 1


def test_an_unknown_receiver_is_an_error(start):
  with pytest.raises(InvariantError, match=r"registered or connected; got 7\."):
    start(0).transport.send(_message(1, receiver=7))


class TestRefusals:
  """Refused and counted, and the next message is taken."""

  def _refused(self, process, raw_call, frame, refusal):
    with pytest.raises(grpc.RpcError) as caught:
      raw_call(process, frame)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    counters = process.counters
    assert counters.refused == getattr(counters, refusal.value) == 1
    assert caught.value.details() == counters.last_refusal
    raw_call(process, WireCodec(Envelope).encode(_message(1, sender=0)))
    assert process.hear(1) == [(1, 1)]
    return counters.last_refusal

  @pytest.fixture
  def process(self, start):
    start(0)
    return start(1, max_message_bytes=200)

  @pytest.mark.parametrize("frame", [b"", b"noise", b"\0" * 200])
  def test_something_else(self, process, raw_call, frame):
    text = self._refused(process, raw_call, frame, Refusal.UNVERSIONED)
    assert "must begin with b'ILLM'" in text

  def test_a_malformed_message(self, process, raw_call):
    frame = WireCodec(Envelope).encode(_message(1))[:-1]
    text = self._refused(process, raw_call, frame, Refusal.MALFORMED)
    assert "must be a JSON document" in text

  def test_another_version(self, process, raw_call):
    right, other = (b"ILLM\0" + bytes([VERSION + more]) for more in (0, 1))
    frame = WireCodec(Envelope).encode(_message(1)).replace(right, other)
    text = self._refused(process, raw_call, frame, Refusal.UNVERSIONED)
    assert text == f"version must be {VERSION}; got {VERSION + 1}."

  def test_a_message_that_is_too_long(self, process, raw_call):
    frame = WireCodec(Envelope).encode(_long_message(3))
    assert 200 < len(frame) < 400
    text = self._refused(process, raw_call, frame, Refusal.OVERSIZED)
    assert text == f"A frame must have at most 200 bytes; got {len(frame)}."

  def test_a_message_for_somebody_else(self, process, raw_call):
    frame = WireCodec(Envelope).encode(_message(1, receiver=GMANAGER))
    text = self._refused(process, raw_call, frame, Refusal.MISDIRECTED)
    assert text == "receiver must be served here; got 'gmanager'."

  def test_a_message_of_a_stranger(self, process, raw_call):
    frame = WireCodec(Envelope).encode(_message(1, sender=5))
    text = self._refused(process, raw_call, frame, Refusal.MISDIRECTED)
    assert text == "sender must be a peer; got 5."

  def test_a_message_in_the_name_of_the_receiver(self, process, raw_call):
    frame = WireCodec(Envelope).encode(_message(1, sender=1))
    self._refused(process, raw_call, frame, Refusal.MISDIRECTED)

  def test_a_message_so_long_that_it_is_not_even_read(self, process, raw_call):
    with pytest.raises(grpc.RpcError) as caught:
      raw_call(process, bytes(401))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    _eventually(lambda: process.counters.cut_short == 1)
    raw_call(process, WireCodec(Envelope).encode(_message(1, sender=0)))
    assert process.hear(1) == [(1, 1)]

  def test_another_method(self, process, raw_call):
    with pytest.raises(grpc.RpcError) as caught:
      raw_call(process, b"", method="/infinite_llm.Transport/Other")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

  def test_more_than_may_wait(self, start, raw_call):
    start(0)
    process = start(1, max_waiting=2)
    codec = WireCodec(Envelope)
    for seq in (1, 2):
      raw_call(process, codec.encode(_message(seq)))
    with pytest.raises(grpc.RpcError) as caught:
      raw_call(process, codec.encode(_message(3)))

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert process.counters.overflowed == 1
    assert process.hear(2) == [(1, 1), (1, 2)]
    raw_call(process, codec.encode(_message(4)))
    assert process.hear(3)[2] == (1, 4)

  def test_what_a_handler_refuses(self, start):
    process = start(0, 1)

    def refuse(envelope):
      raise MessageError(Refusal.MISDIRECTED, "no reader for this")

    process.transport.register(1, refuse)
    process.transport.send(_message(1))
    process.transport.send(_message(2, receiver=0, sender=1))

    assert process.transport.deliver() == 2
    assert process.heard == [(0, 2)]
    assert process.counters.misdirected == 1
    assert process.counters.delivered == 1

  def test_the_sender_learns_that_it_was_refused(self, start):
    one, other = start(0), start(1, max_message_bytes=200)
    one.transport.send(_long_message(3))

    _eventually(lambda: one.counters.refused_by_peer == 1)
    assert other.counters.oversized == 1

  def test_a_message_too_long_to_send(self, start):
    one, _ = start(0, max_message_bytes=200), start(1)

    with pytest.raises(MessageError, match="at most 200 bytes"):
      one.transport.send(_long_message(3))


class TestSecret:
  def test_who_has_the_secret_is_heard(self, start):
    one, other = start(0, secret=_SECRET), start(1, secret=_SECRET)
    one.transport.send(_message(1))

    assert other.hear(1) == [(1, 1)]

  @pytest.mark.parametrize("secret", [None, b"another secret, as long"])
  def test_who_has_not_is_refused_and_counted(self, start, secret):
    one, other = start(0, secret=secret), start(1, secret=_SECRET)
    one.transport.send(_message(1))

    _eventually(lambda: one.counters.refused_by_peer == 1)
    assert other.counters.unauthenticated == 1
    assert other.transport.deliver() == 0

  def test_options_do_not_show_it(self):
    assert "sixteen" not in repr(GrpcOptions(listen="h:1", secret=_SECRET))


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
  return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
  return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


class TestMutualTls:
  def test_members_hear_each_other(self, start, authority):
    one = start(0, tls=authority.issue("one"))
    other = start(1, tls=authority.issue("other"))
    one.transport.send(_message(1))
    other.transport.send(_message(2, receiver=0, sender=1))

    assert other.hear(1) == [(1, 1)]
    assert one.hear(1) == [(0, 2)]
    assert other.counters.handshakes == other.counters.connections == 1

  def test_a_certificate_of_another_authority_is_refused(
    self, start, authority, strangers
  ):
    # The stranger trusts our authority; ours does not trust the stranger's.
    theirs = dataclasses.replace(
      strangers.issue("stranger"), authority=authority.path
    )
    stranger = start(0, tls=theirs, deadline_s=0.3)
    member = start(1, tls=authority.issue("member"))
    stranger.transport.send(_message(1))

    _eventually(lambda: stranger.counters.expired == 1)
    assert stranger.counters.sent == 0
    _eventually(lambda: member.counters.handshakes >= 1)
    assert member.counters.connections == 0
    assert member.transport.deliver() == 0

  def test_a_server_of_another_authority_is_not_spoken_to(
    self, start, authority, strangers
  ):
    theirs = dataclasses.replace(
      strangers.issue("impostor"), authority=authority.path
    )
    member = start(0, tls=authority.issue("caller"), deadline_s=0.3)
    impostor = start(1, tls=theirs)
    member.transport.send(_message(1))

    _eventually(lambda: member.counters.expired == 1)
    assert impostor.counters.connections == 0

  @pytest.mark.parametrize("has_authority", [True, False])
  def test_who_has_no_certificate_is_refused(
    self, start, authority, has_authority
  ):
    member = start(1, tls=authority.issue("served"))
    if has_authority:
      credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
      channel = grpc.secure_channel(member.target, credentials)
    else:
      channel = grpc.insecure_channel(member.target)
    frame = WireCodec(Envelope).encode(_message(1))

    with channel, pytest.raises(grpc.RpcError) as caught:
      channel.unary_unary(METHOD)(frame, timeout=_PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert member.counters.connections == 0
    assert member.counters.handshakes >= 1

  def test_files_that_cannot_be_used_are_named(self, start, authority):
    tls = authority.issue("broken")
    missing = dataclasses.replace(tls, key=tls.key.with_name("none.pem"))
    with pytest.raises(ConfigError, match=r"key must be a readable file; got"):
      start(0, tls=missing)

    tls.key.write_text("no key")
    with pytest.raises(ConfigError, match=r"must be PEM files that fit; got"):
      start(0, tls=tls)


class TestPeersThatAreAway:
  def test_a_peer_that_comes_later_gets_what_waits(self, start):
    with GrpcTransport(GrpcOptions(listen="127.0.0.1:0")) as placeholder:
      port = placeholder.port
    one = start(0, deadline_s=_PATIENCE_S)
    one.transport.connect(1, f"127.0.0.1:{port}")
    one.transport.send(_message(1))
    other = start(1, listen=f"127.0.0.1:{port}")

    assert other.hear(1) == [(1, 1)]

  def test_a_peer_that_died_and_came_back_is_heard_again(self, start):
    one, other = start(0), start(1)
    one.transport.send(_message(1))
    other.hear(1)
    _eventually(lambda: one.counters.sent == 1)
    other.transport.close()
    other = start(1, listen=other.target)

    # What was sent just then may be lost; managers send again.
    def is_heard():
      one.transport.send(_message(2))
      return other.transport.wait(0.05)

    _eventually(is_heard)
    assert other.hear(1)[0] == (1, 2)

  def test_a_peer_that_moved_is_found(self, start):
    one, other = start(0), start(1)
    one.transport.send(_message(1))
    other.hear(1)
    moved = start(1)
    one.transport.send(_message(2))

    assert moved.hear(1) == [(1, 2)]

  def test_messages_expire(self, start):
    one = start(0, deadline_s=0.05)
    one.transport.connect(1, "127.0.0.1:1")
    for seq in (1, 2):
      one.transport.send(_message(seq))

    _eventually(lambda: one.counters.expired == 2)
    assert one.counters.sent == 0

  def test_old_heartbeats_make_room_for_others(self, start):
    with GrpcTransport(GrpcOptions(listen="127.0.0.1:0")) as placeholder:
      port = placeholder.port
    one = start(0, max_waiting=3, deadline_s=_PATIENCE_S)
    one.transport.connect(1, f"127.0.0.1:{port}")
    one.transport.send(_message(1))
    # The first is taken from the queue at once and waits for the connection.
    _eventually(lambda: one.counters.in_flight == 1)
    for seq in (2, 3):
      one.transport.send(_status(seq))
    for seq in (4, 5):
      one.transport.send(_message(seq))
    assert one.counters.dropped == 1

    other = start(1, listen=f"127.0.0.1:{port}")
    assert [seq for _, seq in other.hear(4)] == [1, 3, 4, 5]


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "text"),
    [
      ({"listen": "host"}, r"listen must be host:port; got 'host'"),
      ({"listen": ":1"}, r"listen must be host:port; got ':1'"),
      ({"listen": "h:70000"}, r"listen must be host:port; got 'h:70000'"),
      ({"deadline_s": 0}, r"deadline_s must be positive and finite; got 0"),
      ({"keepalive_s": math.inf}, r"keepalive_s must be positive and finite"),
      ({"max_backoff_s": math.nan}, r"max_backoff_s must be positive and fin"),
      ({"max_waiting": -1}, r"max_waiting must be at least 1; got -1"),
      ({"max_waiting": 1.5}, r"max_waiting must be an integer; got 1\.5"),
      ({"server_threads": 0}, r"server_threads must be at least 1; got 0"),
      ({"server_threads": 1.5}, r"server_threads must be an integer; got 1\.5"),
      ({"secret": "word" * 9}, r"secret must be bytes; got 'str'"),
      ({"max_backoff_s": 0.01}, r"at least min_backoff_s \(0\.1\); got 0\.01"),
    ],
  )
  def test_impossible_ones_are_refused(self, options, text):
    with pytest.raises(ConfigError, match=text):
      GrpcOptions(**({"listen": "127.0.0.1:0"} | options))

  @pytest.mark.parametrize(
    ("options", "text"),
    [
      ({"max_message_bytes": 0}, r"max_bytes must be positive; got 0"),
      ({"secret": b"short"}, r"secret must have at least 16 bytes"),
    ],
  )
  def test_those_of_the_codec_too(self, options, text, start):
    with pytest.raises(ConfigError, match=text):
      start(0, **options)

  def test_an_address_in_use_is_refused(self, start):
    taken = start(0).target
    with pytest.raises(ConfigError, match=rf"to serve at; got '{taken}'"):
      start(1, listen=taken)

  def test_all_of_tls_is_given_by_path(self):
    assert [field.name for field in dataclasses.fields(TlsFiles)] == [
      "certificate",
      "key",
      "authority",
    ]


def test_a_closed_transport_sends_no_more(start):
  one, _ = start(0), start(1)
  one.transport.close()
  one.transport.close()

  with pytest.raises(InvariantError, match="A closed transport must not send"):
    one.transport.send(_message(1))
