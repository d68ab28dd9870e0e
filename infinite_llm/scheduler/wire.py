"""Messages as bytes, for transports that leave the process.

A frame is a header (magic, version, kind of authentication), the code that
authenticates it if there is one, and the message as a JSON document. Readers
take nothing on trust: whatever the bytes, they give a valid envelope or raise
`MessageError`.
"""

import hashlib
import hmac
import json
import reprlib
import struct

from infinite_llm.errors import ConfigError, MessageError, Refusal
from infinite_llm.scheduler.message_schema import (
  Document,
  SchemaError,
  make_schema,
)

VERSION = 6
"""Of the frame and of the meaning of messages; others are refused."""

MAX_BYTES = 16 * 2**20
"""Default limit of a frame: tables of about 200,000 rBlocks."""

MIN_SECRET_BYTES = 16
"""Shorter secrets can be guessed."""

_MAGIC = b"ILLM"
_HEADER = struct.Struct(">4sHB")  # Magic, version, kind of authentication.
_PLAIN = 0
_HMAC_SHA256 = 1
_MAC_BYTES = hashlib.sha256().digest_size


class WireCodec[Message]:
  """Writes and reads the frames of one cluster, for one kind of message."""

  def __init__(
    self,
    kind: type[Message],
    max_bytes: int = MAX_BYTES,
    secret: bytes | None = None,
  ):
    """Makes a codec.

    Args:
      kind: The message's dataclass.
      max_bytes: Longest frame that is written or read.
      secret: Known to all of the cluster and to nobody else: frames carry a
        keyed hash (HMAC-SHA256), and others are refused. It proves that a
        member wrote the frame once; it hides nothing, and a frame may be
        repeated, which managers bear anyway. None neither writes nor accepts
        such frames.

    Raises:
      ConfigError: If the secret is too short or the limit not positive.
    """
    if max_bytes <= 0:
      raise ConfigError(f"max_bytes must be positive; got {max_bytes}.")
    if secret is not None and len(secret) < MIN_SECRET_BYTES:
      raise ConfigError(
        f"secret must have at least {MIN_SECRET_BYTES} bytes; got"
        f" {len(secret)} of them."
      )
    self._max_bytes = max_bytes
    self._secret = secret
    self._schema = make_schema(kind)

  def encode(self, message: Message) -> bytes:
    """Writes a message.

    Raises:
      MessageError: If the frame would be too long.
    """
    encode = self._schema.encode
    document = encode(message) if encode else message
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    kind = _PLAIN if self._secret is None else _HMAC_SHA256
    header = _HEADER.pack(_MAGIC, VERSION, kind)
    frame = header + self._mac(header, body) + body
    self._check_length(frame)
    return frame

  def decode(self, frame: bytes) -> Message:
    """Reads a message.

    Args:
      frame: What `encode` of a codec with the same secret made, or anything.

    Returns:
      The message; every field has the type and range that it is declared with.

    Raises:
      MessageError: If there is none, saying what is wrong.
    """
    self._check_length(frame)
    body = self._open(frame)
    try:
      document = json.loads(
        body.decode("utf-8"),
        object_pairs_hook=_unique_keys,
        parse_constant=_no_constant,
      )
      return self._schema.decode(document)
    except SchemaError as error:
      raise MessageError(Refusal.MALFORMED, f"The message's {error}") from None
    except ValueError as error:  # Also of JSON and of UTF-8.
      raise MessageError(
        Refusal.MALFORMED, f"The message must be a JSON document: {error}."
      ) from None
    except RecursionError:
      raise MessageError(
        Refusal.MALFORMED, "The message must not be nested so deeply."
      ) from None

  def _open(self, frame: bytes) -> bytes:
    """Checks a frame's header and authentication; gives its document."""
    if len(frame) < _HEADER.size or not frame.startswith(_MAGIC):
      raise MessageError(
        Refusal.UNVERSIONED,
        f"A frame must begin with {_MAGIC!r} and a version; got"
        f" {reprlib.repr(frame)}.",
      )
    _, version, kind = _HEADER.unpack_from(frame)
    if version != VERSION:
      raise MessageError(
        Refusal.UNVERSIONED, f"version must be {VERSION}; got {version}."
      )
    wanted = _PLAIN if self._secret is None else _HMAC_SHA256
    if kind != wanted:
      raise MessageError(
        Refusal.UNAUTHENTICATED,
        f"authentication must be of kind {wanted}; got {kind}.",
      )
    if self._secret is None:
      return frame[_HEADER.size :]
    header = frame[: _HEADER.size]
    mac = frame[_HEADER.size : _HEADER.size + _MAC_BYTES]
    body = frame[_HEADER.size + _MAC_BYTES :]
    if not hmac.compare_digest(mac, self._mac(header, body)):
      raise MessageError(
        Refusal.UNAUTHENTICATED,
        "The frame must be authenticated with this cluster's secret; got"
        f" another code over {len(body)} bytes.",
      )
    return body

  def _mac(self, header: bytes, body: bytes) -> bytes:
    if self._secret is None:
      return b""
    return hmac.digest(self._secret, header + body, "sha256")

  def _check_length(self, frame: bytes) -> None:
    if len(frame) > self._max_bytes:
      raise MessageError(
        Refusal.OVERSIZED,
        f"A frame must have at most {self._max_bytes} bytes; got {len(frame)}.",
      )


def _unique_keys(pairs: list[tuple[str, Document]]) -> dict[str, Document]:
  document = dict(pairs)
  if len(document) != len(pairs):
    keys = sorted(key for key, _ in pairs)
    raise ValueError(f"keys must differ; got {reprlib.repr(keys)}")
  return document


def _no_constant(name: str) -> Document:
  raise ValueError(f"numbers must be finite; got {name}")
