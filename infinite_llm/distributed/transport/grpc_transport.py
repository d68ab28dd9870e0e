"""Messages between processes, over gRPC.

Each message is one call with one frame of `scheduler/wire.py`; nothing has to
be generated at build time. Managers' code never runs on a thread of gRPC: what
arrives waits until `deliver` hands it over on the caller's thread.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Self

import grpc

from infinite_llm.distributed.transport.base import Handler
from infinite_llm.distributed.transport.counters import (
  Tally,
  TransportCounters,
)
from infinite_llm.distributed.transport.grpc_link import (
  METHOD,
  Link,
  channel_credentials,
  keepalive,
)
from infinite_llm.distributed.transport.grpc_options import (
  GrpcOptions,
  TlsFiles,
)
from infinite_llm.distributed.transport.peer_queue import Waiting
from infinite_llm.errors import (
  ConfigError,
  InvariantError,
  MessageError,
  Refusal,
)
from infinite_llm.scheduler.messages import (
  ANSWER_TO,
  Address,
  Envelope,
)
from infinite_llm.scheduler.wire import WireCodec

_AWAITED = frozenset({*ANSWER_TO, *ANSWER_TO.values()})
"""Kinds of messages that somebody waits for; reports are not among them."""


class GrpcTransport:
  """Connects the managers of this process with those of others.

  Serves from construction until `close`. `send` may be called from any thread;
  one thread at a time calls `deliver`.
  """

  def __init__(
    self, options: GrpcOptions, clock: Callable[[], float] = time.monotonic
  ):
    """Begins to serve; nobody is registered or connected yet.

    Args:
      options: This process's end.
      clock: Monotonic seconds, for deadlines.

    Raises:
      ConfigError: If the address cannot be listened at, or a certificate cannot
        be used.
    """
    self._options = options
    self._clock = clock
    self._codec = WireCodec(Envelope, options.max_message_bytes, options.secret)
    self._handlers: dict[Address, Handler] = {}
    self._targets: dict[Address, str] = {}
    self._links: dict[str, Link] = {}
    self._inbox: collections.deque[Envelope] = collections.deque()
    self._arrived = threading.Condition()
    self._tally = Tally()
    self._is_closed = False
    self._channel_credentials = channel_credentials(options.tls)
    self._executor = futures.ThreadPoolExecutor(
      options.server_threads, thread_name_prefix="transport-server"
    )
    self._server = self._make_server()
    self._server.start()

  @property
  def port(self) -> int:
    """Where it serves."""
    return self._port

  def register(self, address: Address, handler: Handler) -> None:
    """Has messages to an address handed to `handler` from now on.

    The handler may raise `MessageError`: the message is counted as refused.
    """
    self._handlers[address] = handler

  def connect(self, address: Address, target: str) -> None:
    """Says where an address is served; connects on the first message to it.

    Messages from addresses that were never connected are refused.

    Args:
      address: A manager of another process.
      target: The process's `host:port`.
    """
    old = self._targets.get(address)
    self._targets[address] = target
    if old is not None and old not in self._targets.values():
      with self._arrived:
        link = self._links.pop(old, None)
      if link is not None:
        link.close()

  def send(self, envelope: Envelope) -> None:
    """Takes a message to carry; returns at once.

    Raises:
      InvariantError: If nobody knows the receiver, or after `close`.
      MessageError: If it is longer than the limit.
    """
    if self._is_closed:
      raise InvariantError(f"A closed transport must not send; got {envelope}.")
    receiver = envelope.receiver
    if receiver in self._handlers:
      with self._arrived:
        self._inbox.append(envelope)
        self._arrived.notify()
      return
    if receiver not in self._targets:
      raise InvariantError(
        f"receiver must be registered or connected; got {receiver!r}."
      )
    frame = Waiting(
      frame=self._codec.encode(envelope),
      is_replaceable=type(envelope.body) not in _AWAITED,
      expires_s=self._clock() + self._options.deadline_s,
    )
    self._link(self._targets[receiver]).queue.put(frame)

  def has_mail(self) -> bool:
    """Whether any message has arrived that was not handed over."""
    return bool(self._inbox)

  def deliver(self) -> int:
    """Hands over what has arrived, on this thread.

    Returns:
      How many messages there were.
    """
    count = len(self._inbox)
    for _ in range(count):
      envelope = self._inbox.popleft()
      try:
        self._handlers[envelope.receiver](envelope)
      except MessageError as error:
        self._tally.refuse(error)
      else:
        self._tally.count("delivered")
    return count

  def wait(self, timeout_s: float) -> bool:
    """Blocks the caller until there is a message to deliver.

    Args:
      timeout_s: At most so long.

    Returns:
      Whether there is one.
    """
    with self._arrived:
      return self._arrived.wait_for(lambda: bool(self._inbox), timeout_s)

  def counters(self) -> TransportCounters:
    """What happened so far."""
    with self._arrived:
      loads = [link.queue.load() for link in self._links.values()]
    return self._tally.snapshot(
      waiting=sum(waiting for waiting, _ in loads),
      in_flight=sum(in_flight for _, in_flight in loads),
    )

  def close(self) -> None:
    """Stops serving and sending; waits for all its threads.

    What waits to be sent is forgotten; what has arrived can still be delivered.
    """
    self._is_closed = True
    for link in self._links.values():
      link.close()
    self._server.stop(grace=None).wait()
    self._executor.shutdown()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _make_server(self) -> grpc.Server:
    options = self._options
    server = grpc.server(
      self._executor,
      handlers=[_Service(self._on_call)],
      options=[
        # Frames a little too long are read, so that they can be counted.
        ("grpc.max_receive_message_length", 2 * options.max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 0),
        *keepalive(options),
      ],
      maximum_concurrent_rpcs=options.max_waiting,
    )
    try:
      if options.tls is None:
        self._port = server.add_insecure_port(options.listen)
      else:
        credentials = self._server_credentials(options.tls)
        self._port = server.add_secure_port(options.listen, credentials)
    except RuntimeError as error:
      self._executor.shutdown()
      raise ConfigError(
        f"listen must be an address to serve at; got {options.listen!r}:"
        f" {error}"
      ) from error
    return server

  def _server_credentials(self, tls: TlsFiles) -> grpc.ServerCredentials:
    certificate, key, authority = tls.read()
    # gRPC says nothing of handshakes that fail; it does ask for certificates
    # at each one.
    return grpc.dynamic_ssl_server_credentials(
      grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=authority
      ),
      lambda: self._tally.count("handshakes"),
      require_client_authentication=True,
    )

  def _link(self, target: str) -> Link:
    with self._arrived:
      if target not in self._links:
        self._links[target] = Link(
          target,
          self._options,
          self._channel_credentials,
          self._clock,
          self._tally,
        )
      return self._links[target]

  def _on_call(
    self, frames: Iterator[bytes], context: grpc.ServicerContext
  ) -> bytes:
    """Takes what a peer sends, on a thread of the server."""
    self._tally.hear(context.peer())
    try:
      frame = next(frames, None)
    except grpc.RpcError:
      frame = None
    if frame is None:
      self._tally.count("cut_short")
      return b""
    try:
      has_room = self._take(frame)
    except MessageError as error:
      self._tally.refuse(error)
      context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
      context.set_details(str(error))
      return b""
    if not has_room:
      self._tally.count("overflowed")
      context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
      context.set_details("Too many messages wait to be delivered.")
    return b""

  def _take(self, frame: bytes) -> bool:
    """Puts a message before `deliver`; whether there was room."""
    envelope = self._codec.decode(frame)
    if envelope.receiver not in self._handlers:
      raise MessageError(
        Refusal.MISDIRECTED,
        f"receiver must be served here; got {envelope.receiver!r}.",
      )
    if envelope.sender not in self._targets:
      raise MessageError(
        Refusal.MISDIRECTED,
        f"sender must be a peer; got {envelope.sender!r}.",
      )
    with self._arrived:
      if len(self._inbox) >= self._options.max_waiting:
        return False
      self._inbox.append(envelope)
      self._arrived.notify()
    return True


class _Service(grpc.GenericRpcHandler):
  """Serves the one method with bytes in and out.

  It takes a stream, of which a single message is a special case: that the frame
  did not come whole then shows where it is read.
  """

  def __init__(
    self, on_call: Callable[[Iterator[bytes], grpc.ServicerContext], bytes]
  ):
    self._handler = grpc.stream_unary_rpc_method_handler(on_call)

  def service(
    self, handler_call_details: grpc.HandlerCallDetails
  ) -> grpc.RpcMethodHandler | None:
    """Finds the handler of a method; None if there is no such method."""
    is_known = handler_call_details.method == METHOD
    return self._handler if is_known else None
