import pytest

from infinite_llm.distributed.transport import in_process
from infinite_llm.distributed.transport.base import Transport
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.messages import (
  GMANAGER,
  CandidatesRequest,
  Envelope,
)


def _message(seq, receiver=1, sender=0):
  return Envelope(
    sender=sender,
    receiver=receiver,
    incarnation=1,
    seq=seq,
    body=CandidatesRequest(num_blocks=seq),
  )


def _listening(*addresses, interceptor=None):
  transport: Transport = InProcessTransport(interceptor)
  heard = []
  for address in addresses:
    transport.register(address, lambda m, a=address: heard.append((a, m.seq)))
  return transport, heard


def test_messages_arrive_in_the_order_of_sending():
  transport, heard = _listening(0, 1, GMANAGER)
  transport.send(_message(1, receiver=1))
  transport.send(_message(2, receiver=GMANAGER))
  transport.send(_message(3, receiver=0))
  assert not heard

  assert transport.deliver() == 3
  assert heard == [(1, 1), (GMANAGER, 2), (0, 3)]
  assert transport.deliver() == 0


def test_answers_sent_meanwhile_are_delivered_too():
  transport, heard = _listening(0)
  transport.register(1, lambda m: transport.send(_message(m.seq + 1, 0, 1)))
  transport.send(_message(1))

  assert transport.deliver() == 2
  assert heard == [(0, 2)]


def test_an_interceptor_loses_repeats_and_delays():
  late = []

  def interceptor(envelope):
    match envelope.seq:
      case 1:
        return []
      case 2:
        return [envelope, envelope]
      case 3:
        late.append(envelope)
        return []
      case _:
        return [envelope, *late]

  transport, heard = _listening(1, interceptor=interceptor)
  for seq in (1, 2, 3, 4):
    transport.send(_message(seq))

  assert transport.deliver() == 4
  assert heard == [(1, 2), (1, 2), (1, 4), (1, 3)]


def test_an_unknown_receiver_is_refused():
  transport, _ = _listening(0)

  with pytest.raises(InvariantError, match=r"got 1, registered are \['0'\]"):
    transport.send(_message(1, receiver=1))


def test_managers_that_never_come_to_rest_are_noticed(monkeypatch):
  monkeypatch.setattr(in_process, "_MAX_DELIVERIES", 10)
  transport = InProcessTransport()
  transport.register(1, lambda m: transport.send(m))
  transport.send(_message(1))

  with pytest.raises(InvariantError, match=r"10 messages in a row"):
    transport.deliver()
