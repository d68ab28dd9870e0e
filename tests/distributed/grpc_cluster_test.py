"""The managers of the engine, each in a process of its own as far as it knows.

Devices and the loop around them are those of `FakeCluster`; only the transport
is another one.
"""

import dataclasses
import threading
import time

import pytest

from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.messages import GMANAGER
from infinite_llm.types import PoolCounts
from tests.distributed.certificates import Authority
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

_PATIENCE_S = 30.0


class Processes:
  """Several gRPC transports under one roof, each with its own addresses.

  `deliver` waits until the network is done with all that was sent, so that a
  test's events come one after the other.
  """

  def __init__(self, homes, **options):
    """Starts the transports.

    Args:
      homes: For each process, the addresses that it serves.
      **options: Of `GrpcOptions`, for all of them.
    """
    self._options = {"min_backoff_s": 0.01, "max_backoff_s": 0.05} | options
    self._home = {
      address: process
      for process, addresses in enumerate(homes)
      for address in addresses
    }
    self.transports = [self._make("127.0.0.1:0") for _ in homes]
    self._connect()
    self._handlers = {}

  def _make(self, listen):
    return GrpcTransport(GrpcOptions(listen=listen, **self._options))

  def _connect(self):
    for process, transport in enumerate(self.transports):
      for address, home in self._home.items():
        if home != process:
          target = f"127.0.0.1:{self.transports[home].port}"
          transport.connect(address, target)

  def register(self, address, handler):
    self._handlers[address] = handler
    self.transports[self._home[address]].register(address, handler)

  def send(self, envelope):
    self.transports[self._home[envelope.sender]].send(envelope)

  def deliver(self):
    deadline_s = time.monotonic() + _PATIENCE_S
    while not self._is_quiet():
      assert time.monotonic() < deadline_s, "The network never came to rest."
      time.sleep(0.001)
    return sum(transport.deliver() for transport in self.transports)

  def _is_quiet(self):
    counters = [transport.counters() for transport in self.transports]
    return not any(count.waiting or count.in_flight for count in counters)

  def restart(self, process):
    """Loses the connections and the messages of a process."""
    old = self.transports[process]
    old.close()
    self.transports[process] = self._make(f"127.0.0.1:{old.port}")
    self._connect()
    for address, home in self._home.items():
      if home == process:
        self.transports[process].register(address, self._handlers[address])

  def close(self):
    for transport in self.transports:
      transport.close()


@pytest.fixture
def cluster():
  """Makes clusters over gRPC; all their threads must end."""
  threads = set(threading.enumerate())
  made = []

  def cluster(homes, **options):
    num_instances = sum(len(addresses) for addresses in homes) - 1
    made.append(Processes(homes, **options))
    cluster = FakeCluster(num_instances, 9, transport=made[-1])
    cluster.heartbeat()
    return cluster

  yield cluster
  for processes in made:
    processes.close()
  assert set(threading.enumerate()) == threads


def _assert_life_of_a_borrow(cluster):
  """Instance 0 lends three rBlocks out and gets them all back."""
  table = cluster.open(0, 7, 8 * BLOCK_SIZE - 1)
  assert cluster.managers[0].borrow(7, 3)
  cluster.settle()

  assert table.local_entries().block_ids.tolist() == [4, 5, 6, 7, 8]
  assert cluster.managers[0].borrowed() == {1: 3}
  assert cluster.managers[1].lent() == {0: 3}
  assert cluster.managers[1].counts() == PoolCounts(
    used=0, free=5, hosted=3, reserved=0, total=8
  )
  assert cluster.covers(0, 7, 8 * BLOCK_SIZE - 1)
  cluster.check()
  cluster.check_agreement()

  cluster.managers[0].close(7)
  cluster.settle()
  cluster.check_empty()


def _assert_nothing_was_refused(cluster):
  for transport in cluster.transport.transports:
    counters = transport.counters()
    assert counters.refused == 0
    assert counters.last_refusal is None
    assert counters.sent > 0


@pytest.mark.parametrize(
  "homes",
  [
    [(0, GMANAGER), (1,)],
    [(0,), (1,), (2, GMANAGER)],
    [(0,), (1, 2, GMANAGER)],
  ],
)
def test_a_borrow_goes_as_within_one_process(cluster, homes):
  cluster = cluster(homes)
  _assert_life_of_a_borrow(cluster)
  _assert_nothing_was_refused(cluster)


def test_a_borrow_goes_over_mutual_tls_with_a_secret(cluster, tmp_path):
  tls = Authority(tmp_path, "cluster").issue("everybody")
  cluster = cluster(
    [(0,), (1,), (GMANAGER,)], tls=tls, secret=b"sixteen bytes or"
  )
  _assert_life_of_a_borrow(cluster)
  _assert_nothing_was_refused(cluster)
  assert all(
    transport.counters().connections
    for transport in cluster.transport.transports
  )


@pytest.mark.parametrize("process", [0, 1, 2])
@pytest.mark.parametrize("phase", [Phase.ASKING, Phase.RESERVING, Phase.MOVING])
def test_a_borrow_outlives_a_lost_connection(cluster, process, phase):
  cluster = cluster([(0,), (1,), (GMANAGER,)], deadline_s=0.2)
  manager = cluster.managers[0]
  cluster.open(0, 7, 4 * BLOCK_SIZE)
  assert manager.borrow(7, 2)
  for _ in until(lambda: manager.phase(7) is phase):
    cluster.carry()
  cluster.transport.restart(process)
  for _ in until(lambda: manager.borrowed() == {1: 2}):
    cluster.tick()
    cluster.settle()

  cluster.check_agreement()
  assert cluster.covers(0, 7, 4 * BLOCK_SIZE)
  manager.close(7)
  for _ in until(lambda: manager.borrowed() == {}):
    cluster.tick()
    cluster.settle()
  cluster.check_empty()


def test_a_message_for_another_kind_of_manager_is_refused_and_counted(cluster):
  cluster = cluster([(0,), (1, GMANAGER)])
  cluster.now_s += 1.0
  cluster.managers[0].tick()
  (heartbeat,) = cluster.managers[0].drain_messages()
  before = cluster.gmanager.view()
  cluster.transport.send(dataclasses.replace(heartbeat, receiver=1))
  cluster.settle()

  assert cluster.managers[1].refused == {"Heartbeat": 1}
  assert cluster.gmanager.view() == before
