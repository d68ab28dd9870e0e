"""The link between the processes of a lending group: one stream per member.

gRPC keeps the order, frames the messages, encrypts if asked to and notices a
silent peer. A stream that ends is a process that is gone, and with it the group
(`DESIGN.md` section 7): nothing is repeated, nobody connects again.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import jax

from infinite_llm.distributed.group_messages import (
  FromLeader,
  FromMember,
  Hello,
  LeaderFrame,
  MemberFrame,
  Refused,
)
from infinite_llm.distributed.transport.grpc_link import (
  channel_credentials,
  keepalive,
)
from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.errors import ConfigError, GroupError, MessageError
from infinite_llm.scheduler.wire import WireCodec

_METHOD = "/infinite_llm.Group/Join"
_MAX_BYTES = 2**28  # A prompt of ten million tokens.
_UNLIMITED = [
  ("grpc.max_receive_message_length", 2 * _MAX_BYTES),
  ("grpc.max_send_message_length", 2 * _MAX_BYTES),
]
_END = None
_GRACE_S = 3.0
_LOOK_EVERY_S = 0.1

type Admit = Callable[[Hello], str | None]
"""Says why a member is not wanted; None if it is."""


class LeaderLink:
  """The leader's end: a stream to each member."""

  def __init__(self, options: GrpcOptions, num_members: int, admit: Admit):
    """Serves from now on.

    Args:
      options: Where to listen, and how to authenticate.
      num_members: Members that are awaited, numbered from 1 on.
      admit: Decides about those that come; called on threads of gRPC, one at a
        time.

    Raises:
      ConfigError: If the address cannot be listened at.
    """
    self._num_members = num_members
    self._admit = admit
    self._decode = WireCodec(MemberFrame, _MAX_BYTES, options.secret).decode
    self._encode = WireCodec(LeaderFrame, _MAX_BYTES, options.secret).encode
    self._lock = threading.Condition()
    self._hellos: dict[int, Hello] = {}
    self._outgoing: dict[int, queue.SimpleQueue[bytes | None]] = {}
    self._inbox: collections.deque[tuple[int, FromMember]] = collections.deque()
    self._lost: str | None = None
    self._is_complete = False
    self._is_closing = False
    # A stream holds a thread for each of its directions as long as it lasts,
    # and one that is refused needs them too.
    self._executor = futures.ThreadPoolExecutor(
      num_members + 8, thread_name_prefix="group-leader"
    )
    self._server = grpc.server(
      self._executor,
      handlers=[_Service(self._serve)],
      options=[
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 0),
        *_UNLIMITED,
        *keepalive(options),
      ],
    )
    try:
      if options.tls is None:
        self.port = self._server.add_insecure_port(options.listen)
      else:
        certificate, key, authority = options.tls.read()
        credentials = grpc.ssl_server_credentials(
          [(key, certificate)],
          root_certificates=authority,
          require_client_auth=True,
        )
        self.port = self._server.add_secure_port(options.listen, credentials)
    except RuntimeError as error:
      self._executor.shutdown()
      raise ConfigError(
        f"coordinator must be an address to serve at; got {options.listen!r}:"
        f" {error}"
      ) from error
    self._server.start()

  def await_members(self, timeout_s: float) -> list[Hello]:
    """Blocks until all members are there.

    One that goes before that leaves its place to whoever comes under its
    number; one that goes later is lost.

    Returns:
      Their first words, by number.

    Raises:
      GroupError: If some are missing after `timeout_s`, naming them.
    """
    with self._lock:
      self._is_complete = self._lock.wait_for(
        lambda: len(self._hellos) == self._num_members, timeout_s
      )
      missing = [
        n for n in range(1, self._num_members + 1) if n not in self._hellos
      ]
      if missing:
        raise GroupError(
          f"All {self._num_members + 1} processes must start within"
          f" {timeout_s:g} s; of process(es)"
          f" {', '.join(map(str, missing))} nothing was heard."
        )
      return [self._hellos[n] for n in range(1, self._num_members + 1)]

  def send(self, process: int, message: FromLeader) -> None:
    """Says something to one member; returns at once."""
    self._outgoing[process].put(self._encode(LeaderFrame(body=message)))

  def broadcast(self, message: FromLeader) -> None:
    """Says something to all members; returns at once."""
    frame = self._encode(LeaderFrame(body=message))
    for outgoing in self._outgoing.values():
      outgoing.put(frame)

  def has_mail(self) -> bool:
    """Whether `receive` has something to give or to raise."""
    return bool(self._inbox) or self._lost is not None

  def receive(self) -> list[tuple[int, FromMember]]:
    """What has arrived: process and message, in order for each process.

    Raises:
      GroupError: If a member is gone.
    """
    if self._lost is not None:
      raise GroupError(self._lost)
    return [self._inbox.popleft() for _ in range(len(self._inbox))]

  @property
  def lost(self) -> str | None:
    """Which process is gone; None if none is."""
    return self._lost

  def close(self) -> None:
    """Ends all streams once what was said has gone out."""
    with self._lock:
      self._is_closing = True
      streams = tuple(self._outgoing.values())
    for outgoing in streams:
      outgoing.put(_END)
    self._server.stop(grace=2).wait()
    self._executor.shutdown()

  def _serve(
    self, frames: Iterator[bytes], context: grpc.ServicerContext
  ) -> Iterator[bytes]:
    """One member's stream, on a thread of the server."""
    try:
      hello = self._decode(next(frames)).body
    except (grpc.RpcError, StopIteration):
      return
    except MessageError as error:
      context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if not isinstance(hello, Hello):
      context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, "A member must begin with Hello."
      )
      return
    with self._lock:
      reason = self._reason_against(hello)
      if reason is None:
        outgoing = queue.SimpleQueue[bytes | None]()
        self._outgoing[hello.process] = outgoing
        self._hellos[hello.process] = hello
        self._lock.notify_all()
    if reason is not None:
      yield self._encode(LeaderFrame(body=Refused(reason=reason)))
      return
    if not context.add_callback(lambda: self._on_end(hello.process)):
      self._on_end(hello.process)  # It is gone already.
      return
    reader = threading.Thread(
      target=self._read, args=(hello.process, frames), daemon=True
    )
    reader.start()
    while (frame := outgoing.get()) is not _END:
      yield frame

  def _reason_against(self, hello: Hello) -> str | None:
    if not 1 <= hello.process <= self._num_members:
      return (
        f"process must be in [1, {self._num_members}]; got {hello.process}."
      )
    if hello.process in self._hellos:
      return f"Process {hello.process} has joined already."
    return self._admit(hello)

  def _read(self, process: int, frames: Iterator[bytes]) -> None:
    try:
      for frame in frames:
        self._inbox.append((process, self._decode(frame).body))
    except grpc.RpcError:
      pass  # `_on_end` hears of it too.
    except MessageError as error:
      self._lose(f"Process {process} sent what it must not: {error}")

  def _on_end(self, process: int) -> None:
    with self._lock:
      self._outgoing[process].put(_END)
      if not self._is_complete:
        del self._hellos[process], self._outgoing[process]
        return
    self._lose(f"Process {process} is gone.")

  def _lose(self, text: str) -> None:
    if not self._is_closing and self._lost is None:
      self._lost = text


class MemberLink:
  """A member's end: a stream to the leader."""

  def __init__(self, target: str, options: GrpcOptions):
    """Prepares to connect.

    Args:
      target: `host:port` of the leader.
      options: How to authenticate.
    """
    self._target = target
    self._encode = WireCodec(MemberFrame, _MAX_BYTES, options.secret).encode
    self._decode = WireCodec(LeaderFrame, _MAX_BYTES, options.secret).decode
    self._outgoing = queue.SimpleQueue[bytes | None]()
    self._inbox: collections.deque[FromLeader] = collections.deque()
    self._arrived = threading.Condition()
    self._lost: str | None = None
    arguments = [
      ("grpc.enable_http_proxy", 0),
      ("grpc.use_local_subchannel_pool", 1),
      ("grpc.initial_reconnect_backoff_ms", 100),
      ("grpc.max_reconnect_backoff_ms", 1000),
      *_UNLIMITED,
      *keepalive(options),
    ]
    credentials = channel_credentials(options.tls)
    if credentials is None:
      self._channel = grpc.insecure_channel(target, arguments)
    else:
      self._channel = grpc.secure_channel(target, credentials, arguments)

  def join(self, hello: Hello, timeout_s: float) -> None:
    """Connects and introduces itself.

    Blocks until the leader is there.

    Raises:
      GroupError: If there is no leader within `timeout_s`.
    """
    try:
      grpc.channel_ready_future(self._channel).result(timeout_s)
    except grpc.FutureTimeoutError:
      raise GroupError(
        f"Process {hello.process} found no process 0 at {self._target} within"
        f" {timeout_s:g} s."
      ) from None
    self.send(hello)
    frames = self._channel.stream_stream(_METHOD)(
      iter(self._outgoing.get, _END)
    )
    threading.Thread(target=self._read, args=(frames,), daemon=True).start()

  def send(self, message: FromMember) -> None:
    """Says something to the leader; returns at once."""
    self._outgoing.put(self._encode(MemberFrame(body=message)))

  def has_mail(self) -> bool:
    """Whether `receive` has something to give or to raise."""
    return bool(self._inbox) or self._lost is not None

  def receive(self) -> list[FromLeader]:
    """What has arrived, in order.

    Raises:
      GroupError: If the leader is gone, and all that it said was received.
    """
    if not self._inbox and self._lost is not None:
      raise GroupError(self._lost)
    return [self._inbox.popleft() for _ in range(len(self._inbox))]

  def next(self, timeout_s: float) -> FromLeader:
    """Blocks until the leader says something.

    Raises:
      GroupError: If it does not within `timeout_s`, or is gone.
    """
    with self._arrived:
      if not self._arrived.wait_for(self.has_mail, timeout_s):
        raise GroupError(f"Process 0 said nothing for {timeout_s:g} s.")
    if not self._inbox:
      raise GroupError(str(self._lost))
    return self._inbox.popleft()

  @property
  def lost(self) -> str | None:
    """Says so if process 0 is gone; None if it is not."""
    return self._lost

  def close(self) -> None:
    """Ends the stream once what was said has gone out."""
    self._outgoing.put(_END)
    deadline_s = time.monotonic() + 2
    with self._arrived:
      self._arrived.wait_for(
        lambda: self._lost is not None, deadline_s - time.monotonic()
      )
    self._channel.close()

  def _read(self, frames: Iterator[bytes]) -> None:
    text = "Process 0 is gone."
    try:
      for frame in frames:
        message = self._decode(frame).body
        with self._arrived:
          self._inbox.append(message)
          self._arrived.notify_all()
    except MessageError as error:
      text = f"Process 0 sent what it must not: {error}"
    except grpc.RpcError as error:
      if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        text = f"Process 0 does not understand: {error.details()}"
    with self._arrived:
      self._lost = text
      self._arrived.notify_all()


def shows_loss(link: LeaderLink | MemberLink, error: BaseException) -> bool:
  """Whether a process is gone, of which JAX may have told first.

  Args:
    link: What will tell of it soon; blocks the host as long.
    error: What ended this process's part.
  """
  deadline_s = time.monotonic() + _GRACE_S
  if isinstance(error, jax.errors.JaxRuntimeError):
    while link.lost is None and time.monotonic() < deadline_s:
      time.sleep(_LOOK_EVERY_S)
  return link.lost is not None


class _Service(grpc.GenericRpcHandler):
  """Serves the one method with bytes in and out."""

  def __init__(
    self,
    serve: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]],
  ):
    self._handler = grpc.stream_stream_rpc_method_handler(serve)

  def service(
    self, handler_call_details: grpc.HandlerCallDetails
  ) -> grpc.RpcMethodHandler | None:
    """Finds the handler of a method; None if there is no such method."""
    return self._handler if handler_call_details.method == _METHOD else None
