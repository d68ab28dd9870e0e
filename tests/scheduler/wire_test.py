import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.errors import ConfigError, MessageError, Refusal
from infinite_llm.scheduler.lease_messages import (
  Commit,
  Grant,
  HostedEntry,
  SlotName,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  Body,
  CandidatesRequest,
  Envelope,
  Heartbeat,
)
from infinite_llm.scheduler.wire import MAX_BYTES, VERSION, WireCodec
from infinite_llm.types import PoolCounts
from tests.scheduler.any_message import ENVELOPES, kinds, values

_FUZZ = hypothesis.settings(max_examples=300)
_SECRET = b"sixteen bytes or"
_HEADER_BYTES = 7
_CODEC = WireCodec(Envelope)
_SEALED = WireCodec(Envelope, secret=_SECRET)


_JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


def _ask(**changes):
  values = {
    "sender": 1,
    "receiver": GMANAGER,
    "incarnation": 2,
    "seq": 3,
    "body": CandidatesRequest(num_blocks=4),
    "settled": 1,
  }
  return Envelope(**(values | changes))


def _frame(document):
  header = b"ILLM" + VERSION.to_bytes(2, "big") + b"\0"
  if not isinstance(document, bytes):
    document = json.dumps(document).encode()
  return header + document


def _document(envelope):
  return json.loads(_CODEC.encode(envelope)[_HEADER_BYTES:])


def _refusal(frame, codec=_CODEC):
  with pytest.raises(MessageError) as caught:
    codec.decode(frame)
  return caught.value.refusal, str(caught.value)


def _is_refused_or_sound(frame, codec=_CODEC):
  """Either `MessageError`, or a message that is as good as any other."""
  try:
    envelope = codec.decode(frame)
  except MessageError:
    return
  assert codec.decode(codec.encode(envelope)) == envelope


def _places(document, place=()):
  yield place
  if isinstance(document, dict):
    for key, value in document.items():
      yield from _places(value, (*place, key))
  if isinstance(document, list):
    for i, value in enumerate(document):
      yield from _places(value, (*place, i))


def _replaced(document, place, value):
  if not place:
    return value
  if isinstance(document, dict):
    inner = _replaced(document[place[0]], place[1:], value)
    return {**document, place[0]: inner}
  changed = list(document)
  changed[place[0]] = _replaced(document[place[0]], place[1:], value)
  return changed


class TestFrames:
  def test_a_message_travels_as_these_bytes(self):
    assert _CODEC.encode(_ask()) == (
      b'ILLM\0\6\0{"sender":1,"receiver":"gmanager","incarnation":2,"seq":3,'
      b'"body":{"CandidatesRequest":{"num_blocks":4}},"settled":1,'
      b'"meant_for":0,"responder":0,"leader_epoch":0,"turn":0}'
    )

  @pytest.mark.parametrize("kind", kinds(Body), ids=lambda kind: kind.__name__)
  @hypothesis.settings(max_examples=20)
  @hypothesis.given(data=st.data())
  def test_every_kind_of_message_arrives_as_it_was(self, kind, data):
    envelope = dataclasses.replace(
      data.draw(ENVELOPES), body=data.draw(values(kind))
    )

    assert _CODEC.decode(_CODEC.encode(envelope)) == envelope
    assert _SEALED.decode(_SEALED.encode(envelope)) == envelope

  def test_the_default_limit_takes_a_long_table(self):
    entry = HostedEntry(
      logical_id=2**20, grant=Grant(block_id=2**20, epoch=2**32 - 1)
    )
    commit = Commit(
      uid=1, slot=SlotName(slot=0, epoch=1), entries=(entry,) * 200_000
    )

    assert len(_CODEC.encode(_ask(body=commit))) < MAX_BYTES


class TestRefusals:
  def test_a_frame_that_is_too_long(self):
    length = len(_CODEC.encode(_ask()))
    narrow = WireCodec(Envelope, max_bytes=length - 1)
    rule = f"at most {length - 1} bytes; got {length}."

    assert _refusal(_CODEC.encode(_ask()), narrow) == (
      Refusal.OVERSIZED,
      f"A frame must have {rule}",
    )
    with pytest.raises(MessageError, match=rule):
      narrow.encode(_ask())
    assert (
      WireCodec(Envelope, max_bytes=length).decode(_CODEC.encode(_ask()))
      == _ask()
    )

  @pytest.mark.parametrize(
    "frame", [b"", b"ILLM", b"ILLM\0\1", b"GET / HTTP/1.1", b"illm\0\1\0{}"]
  )
  def test_bytes_of_something_else(self, frame):
    refusal, text = _refusal(frame)

    assert refusal is Refusal.UNVERSIONED
    assert "must begin with b'ILLM' and a version" in text

  def test_another_version(self):
    frame = bytearray(_CODEC.encode(_ask()))
    frame[5] += 1

    assert _refusal(bytes(frame)) == (
      Refusal.UNVERSIONED,
      f"version must be {VERSION}; got {VERSION + 1}.",
    )

  @pytest.mark.parametrize(
    ("body", "text"),
    [
      (b"", "must be a JSON document: Expecting value"),
      (b"\xff", "must be a JSON document: 'utf-8' codec can't decode"),
      (b"{", "must be a JSON document: Expecting property name"),
      (b'{"a":1,"a":2}', r"keys must differ; got \['a', 'a'\]"),
      (b'{"a":NaN}', "numbers must be finite; got NaN"),
      (b"9" * 5000, "must be a JSON document: Exceeds the limit"),
      (b"[" * 100_000, "must not be nested so deeply"),
      (b"[]", r"The message's document must be an object for Envelope; got"),
    ],
  )
  def test_a_body_that_is_no_message(self, body, text):
    with pytest.raises(MessageError, match=text) as caught:
      _CODEC.decode(_frame(body))
    assert caught.value.refusal is Refusal.MALFORMED

  @pytest.mark.parametrize(
    ("changes", "text"),
    [
      (
        {"sender": "gmanger"},
        r"sender must be .*'gmanager', 'standby'; got 'gmanger'\.",
      ),
      ({"sender": -1}, r"sender must be an integer in \[0, \d+\] or"),
      ({"receiver": None}, "receiver must be"),
      ({"incarnation": -1}, "incarnation must be an integer"),
      ({"seq": 2**63}, "seq must be an integer"),
      ({"settled": True}, "settled must be an integer .*; got True"),
      ({"body": {}}, "body must be an object with one key out of Reserve,"),
      ({"body": {"Envelope": {}}}, "body must be an object with one key out"),
      (
        {"body": {"CandidatesRequest": {"num_blocks": "4"}}},
        r"body\.CandidatesRequest\.num_blocks must be an integer .*; got '4'",
      ),
      (
        {"body": {"ReserveReply": {"grants": [{"block_id": 0, "epoch": 1}]}}},
        r"body\.ReserveReply\.grants\[0\] is no Grant: A grant must name a",
      ),
      ({"surprise": 1}, "with the fields sender, receiver, incarnation, seq"),
    ],
  )
  def test_a_field_that_breaks_its_rule_is_named(self, changes, text):
    with pytest.raises(MessageError, match=text) as caught:
      _CODEC.decode(_frame(_document(_ask()) | changes))
    assert caught.value.refusal is Refusal.MALFORMED

  @pytest.mark.parametrize(
    ("writer", "reader"),
    [
      (_CODEC, _SEALED),
      (_SEALED, _CODEC),
      (WireCodec(Envelope, secret=b"another secret, as long"), _SEALED),
    ],
  )
  def test_a_frame_of_somebody_without_the_secret(self, writer, reader):
    refusal, _ = _refusal(writer.encode(_ask()), reader)

    assert refusal is Refusal.UNAUTHENTICATED

  def test_a_codec_that_cannot_work(self):
    with pytest.raises(ConfigError, match=r"at least 16 bytes; got 5 of them"):
      WireCodec(Envelope, secret=b"short")
    with pytest.raises(ConfigError, match=r"max_bytes must be positive; got 0"):
      WireCodec(Envelope, max_bytes=0)


class TestHostileBytes:
  """Whatever arrives, the reader raises `MessageError` or nothing."""

  @_FUZZ
  @hypothesis.given(st.binary(max_size=200))
  def test_noise_is_refused(self, noise):
    _refusal(noise)
    _refusal(_frame(noise))

  @_FUZZ
  @hypothesis.given(_JSON)
  def test_a_document_of_something_else_is_refused(self, document):
    assert _refusal(_frame(document))[0] is Refusal.MALFORMED

  @_FUZZ
  @hypothesis.given(ENVELOPES, st.data())
  def test_a_truncated_message_is_refused(self, envelope, data):
    frame = _CODEC.encode(envelope)
    _refusal(frame[: data.draw(st.integers(0, len(frame) - 1))])

  @_FUZZ
  @hypothesis.given(ENVELOPES, st.data())
  def test_flipped_bits_do_no_harm(self, envelope, data):
    frame = bytearray(_CODEC.encode(envelope))
    for _ in range(data.draw(st.integers(1, 3))):
      bit = data.draw(st.integers(0, 8 * len(frame) - 1))
      frame[bit // 8] ^= 1 << bit % 8
    _is_refused_or_sound(bytes(frame))

  @_FUZZ
  @hypothesis.given(ENVELOPES, st.data())
  def test_no_bit_can_be_flipped_without_the_secret(self, envelope, data):
    frame = bytearray(_SEALED.encode(envelope))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    _refusal(bytes(frame), _SEALED)

  @_FUZZ
  @hypothesis.given(ENVELOPES, _JSON, st.data())
  def test_a_value_of_another_type_does_no_harm(self, envelope, value, data):
    document = _document(envelope)
    place = data.draw(st.sampled_from(list(_places(document))))
    _is_refused_or_sound(_frame(_replaced(document, place, value)))

  @_FUZZ
  @hypothesis.given(ENVELOPES, ENVELOPES)
  def test_a_body_under_another_name_does_no_harm(self, one, other):
    ((name, _),) = _document(one)["body"].items()
    ((_, body),) = _document(other)["body"].items()
    _is_refused_or_sound(_frame(_document(one) | {"body": {name: body}}))


def test_a_heartbeat_of_a_thousand_debts_is_short():
  """What is sent most often: ten bytes a debt."""
  counts = PoolCounts(used=0, free=0, hosted=1000, reserved=0, total=1000)
  lent = tuple((instance, 999) for instance in range(1000))
  heartbeat = Heartbeat(counts=counts, lendable=0, lent=lent)

  assert len(_CODEC.encode(_ask(body=heartbeat))) < 11_000
