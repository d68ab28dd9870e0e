"""The sending half of the gRPC transport: one peer process."""

import threading
from collections.abc import Callable

import grpc

from infinite_llm.distributed.transport.counters import Tally
from infinite_llm.distributed.transport.grpc_options import (
  GrpcOptions,
  TlsFiles,
)
from infinite_llm.distributed.transport.peer_queue import PeerQueue

METHOD = "/infinite_llm.Transport/Send"
"""The one method: a frame in, nothing out."""

_REFUSED_BY_PEER = (
  grpc.StatusCode.INVALID_ARGUMENT,
  grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class Link:
  """Sends to one other process, one message at a time, on its own thread.

  Attributes:
    queue: What is to be sent.
  """

  def __init__(
    self,
    target: str,
    options: GrpcOptions,
    credentials: grpc.ChannelCredentials | None,
    clock: Callable[[], float],
    tally: Tally,
  ):
    """Starts the thread; connects on the first message.

    Args:
      target: `host:port` of the other process.
      options: This process's end.
      credentials: For TLS; None talks in plain.
      clock: Monotonic seconds, as of the frames' expiry.
      tally: Counts what becomes of frames.
    """
    self._tally = tally
    self.queue = PeerQueue(
      options.max_waiting,
      clock,
      on_drop=lambda _: tally.count("dropped"),
      on_expiry=lambda _: tally.count("expired"),
    )
    arguments = [
      ("grpc.initial_reconnect_backoff_ms", _ms(options.min_backoff_s)),
      # Despite its name it bounds how long one attempt to connect may take.
      ("grpc.min_reconnect_backoff_ms", _ms(options.deadline_s)),
      ("grpc.max_reconnect_backoff_ms", _ms(options.max_backoff_s)),
      ("grpc.enable_http_proxy", 0),
      ("grpc.use_local_subchannel_pool", 1),
      *keepalive(options),
    ]
    if credentials is None:
      self._channel = grpc.insecure_channel(target, arguments)
    else:
      self._channel = grpc.secure_channel(target, credentials, arguments)
    self._thread = threading.Thread(
      target=self._run, name=f"transport-to-{target}", daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    """Gives up what is being sent and waits for the thread."""
    self.queue.close()
    self._channel.close()
    self._thread.join()

  def _run(self) -> None:
    call = self._channel.unary_unary(METHOD)
    while (taken := self.queue.take()) is not None:
      waiting, remaining_s = taken
      try:
        call(waiting.frame, timeout=remaining_s, wait_for_ready=True)
      except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
          self._tally.count("expired")
        elif code in _REFUSED_BY_PEER:
          self._tally.count("refused_by_peer")
        else:
          self._tally.count("broken_off")
      except ValueError:  # The channel was closed since the queue was asked.
        return
      else:
        self._tally.count("sent")


def keepalive(options: GrpcOptions) -> list[tuple[str, int]]:
  """gRPC's arguments for probing a silent connection, for both ends."""
  return [
    ("grpc.keepalive_time_ms", _ms(options.keepalive_s)),
    ("grpc.keepalive_timeout_ms", _ms(options.keepalive_s)),
    # What a probe is waited for; without it, a minute.
    ("grpc.http2.ping_timeout_ms", _ms(options.keepalive_s)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
  ]


def channel_credentials(tls: TlsFiles | None) -> grpc.ChannelCredentials | None:
  """Credentials of the connecting end; None talks in plain."""
  if tls is None:
    return None
  certificate, key, authority = tls.read()
  return grpc.ssl_channel_credentials(authority, key, certificate)


def _ms(seconds: float) -> int:
  return max(1, round(seconds * 1000))
