"""How a process takes part in a cluster's messages, as validated values."""

import dataclasses
import pathlib
import ssl

from infinite_llm.errors import ConfigError
from infinite_llm.rules import require, require_positive, require_seconds
from infinite_llm.scheduler.wire import MAX_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TlsFiles:
  """PEM files for mutual TLS.

  Attributes:
    certificate: This process's certificate chain; it names the host or IP
      address under which peers reach it.
    key: Its private key.
    authority: Certificates of the authorities whose members are let in.
  """

  certificate: pathlib.Path
  key: pathlib.Path
  authority: pathlib.Path

  def read(self) -> tuple[bytes, bytes, bytes]:
    """Contents of the certificate, the key and the authority.

    Raises:
      ConfigError: If one cannot be read, naming it, or they cannot be used.
    """
    contents: list[bytes] = []
    for field in dataclasses.fields(self):
      path = getattr(self, field.name)
      try:
        contents.append(pathlib.Path(path).read_bytes())
      except OSError as error:
        raise ConfigError(
          f"{field.name} must be a readable file; got {str(path)!r}:"
          f" {error.strerror}."
        ) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
      # gRPC would only say that it cannot listen. An encrypted key is an error,
      # not a question on the terminal.
      context.load_cert_chain(self.certificate, self.key, password="")
      context.load_verify_locations(self.authority)
    except (OSError, ValueError) as error:
      raise ConfigError(
        f"certificate, key and authority must be PEM files that fit; got"
        f" {self}: {error}."
      ) from error
    certificate, key, authority = contents
    return certificate, key, authority


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpcOptions:
  """One process's end of the transport.

  Attributes:
    listen: `host:port` to serve at; port 0 takes a free one.
    tls: Certificates for mutual TLS; None talks in plain.
    secret: Authenticates frames where TLS does not; known to all of the
      cluster. None neither writes nor accepts such frames.
    max_message_bytes: Longest frame that is sent or taken.
    deadline_s: How long a message may wait and travel; later it is worth
      nothing, since requests are sent again and heartbeats are replaced.
    max_waiting: Most messages that wait for one peer, and most that have
      arrived and wait for `deliver`.
    keepalive_s: A silent connection is probed after so long, and given up
      after as long again.
    min_backoff_s: First pause before a lost connection is tried again; it
      grows up to `max_backoff_s`.
    max_backoff_s: Longest such pause.
    server_threads: Threads that read what arrives.
  """

  listen: str
  tls: TlsFiles | None = None
  secret: bytes | None = dataclasses.field(default=None, repr=False)
  max_message_bytes: int = MAX_BYTES
  deadline_s: float = 2.0
  max_waiting: int = 1024
  keepalive_s: float = 10.0
  min_backoff_s: float = 0.1
  max_backoff_s: float = 2.0
  server_threads: int = 4

  def __post_init__(self):
    host, _, port = self.listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 2**16):
      raise ConfigError(f"listen must be host:port; got {self.listen!r}.")
    require_positive(self, "max_waiting", "server_threads")
    require_seconds(
      self, "deadline_s", "keepalive_s", "min_backoff_s", "max_backoff_s"
    )
    if self.secret is not None:  # Not shown: whatever it is, it is secret.
      kind = type(self.secret).__name__
      require(isinstance(self.secret, bytes), "secret", "bytes", kind)
    if self.max_backoff_s < self.min_backoff_s:
      raise ConfigError(
        f"max_backoff_s must be at least min_backoff_s ({self.min_backoff_s});"
        f" got {self.max_backoff_s}."
      )
