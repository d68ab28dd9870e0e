"""A gManager that is killed, stopped and started anew, in real processes."""

import os
import signal
import subprocess
import sys

import pytest

from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.scheduler.messages import GMANAGER, STANDBY
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

pytestmark = pytest.mark.multihost

_OPTIONS = {"min_backoff_s": 0.01, "max_backoff_s": 0.05, "deadline_s": 0.3}
_ROUNDS = 2000


class Instances:
  """Two instances' transports here; gManagers are processes elsewhere."""

  def __init__(self):
    self.transports = [
      GrpcTransport(GrpcOptions(listen="127.0.0.1:0", **_OPTIONS))
      for _ in range(2)
    ]
    self.targets = {
      i: f"127.0.0.1:{t.port}" for i, t in enumerate(self.transports)
    }
    for address in (GMANAGER, STANDBY):
      # Takes a free port for the gManager, and lets go of it.
      with GrpcTransport(GrpcOptions(listen="127.0.0.1:0")) as placeholder:
        self.targets[address] = f"127.0.0.1:{placeholder.port}"
    for instance, transport in enumerate(self.transports):
      for peer, target in self.targets.items():
        if peer != instance:
          transport.connect(peer, target)
    self.processes = {}
    self._num_started = 0

  def start_gmanager(self, address=GMANAGER, others=()):
    peers = [f"{peer}={self.targets[peer]}" for peer in (0, 1, *others)]
    self._num_started += 1
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "tests.multihost.gmanager_process",
        self.targets[address],
        address,
        str(self._num_started),
        *peers,
      ],
      stdout=subprocess.PIPE,
      text=True,
    )
    self.processes[address] = process
    assert process.stdout.readline() == "ready\n"

  def signal_gmanager(self, number):
    os.kill(self.processes[GMANAGER].pid, number)

  def kill_gmanager(self, address=GMANAGER):
    with self.processes.pop(address) as process:  # Waits, and closes its pipe.
      process.kill()

  def register(self, address, handler):
    if isinstance(address, int):
      self.transports[address].register(address, handler)

  def send(self, envelope):
    self.transports[envelope.sender].send(envelope)

  def deliver(self):
    self.transports[0].wait(0.01)
    return sum(transport.deliver() for transport in self.transports)

  def close(self):
    for transport in self.transports:
      transport.close()
    for address in tuple(self.processes):
      self.kill_gmanager(address)


@pytest.fixture
def instances():
  instances = Instances()
  yield instances
  instances.close()


def _pass_time(cluster):
  cluster.tick(0.1)
  cluster.carry()
  cluster.exchange()
  cluster.verify()
  cluster.check()


def _borrow_and_return(cluster, uid):
  manager = cluster.managers[0]
  cluster.open(0, uid, 4 * BLOCK_SIZE)
  for _ in until(lambda: manager.borrowed() == {1: 2}, _ROUNDS):
    manager.borrow(uid, 2)
    _pass_time(cluster)
  assert cluster.covers(0, uid, 4 * BLOCK_SIZE)
  manager.close(uid)
  for _ in until(lambda: manager.borrowed() == {}, _ROUNDS):
    _pass_time(cluster)
  cluster.check_empty()


def test_a_killed_gmanager_is_missed_and_its_successor_used(instances):
  instances.start_gmanager()
  cluster = FakeCluster(2, 9, transport=instances)
  _borrow_and_return(cluster, 1)

  instances.kill_gmanager()
  manager = cluster.managers[0]
  cluster.open(0, 2, 4 * BLOCK_SIZE)
  assert manager.borrow(2, 2)
  for _ in range(50):
    _pass_time(cluster)
  assert manager.is_borrowing()
  assert manager.borrowed() == {}

  instances.start_gmanager()
  for _ in until(lambda: manager.borrowed() == {1: 2}, _ROUNDS):
    manager.borrow(2, 2)
    _pass_time(cluster)
  manager.close(2)
  for _ in until(lambda: manager.borrowed() == {}, _ROUNDS):
    _pass_time(cluster)
  cluster.check_empty()


def test_a_standby_takes_over_from_a_killed_leader(instances):
  instances.start_gmanager(STANDBY, [GMANAGER])
  instances.start_gmanager(GMANAGER, [STANDBY])
  cluster = FakeCluster(2, 9, transport=instances, has_standby=True)
  cluster.gmanagers.clear()  # They are processes.
  _borrow_and_return(cluster, 1)

  instances.kill_gmanager()
  _borrow_and_return(cluster, 2)


def test_a_gmanager_that_hangs_holds_nobody_up(instances):
  instances.start_gmanager()
  cluster = FakeCluster(2, 9, transport=instances)
  _borrow_and_return(cluster, 1)

  instances.signal_gmanager(signal.SIGSTOP)
  transport = instances.transports[0]
  for _ in until(lambda: transport.counters().expired > 3, _ROUNDS):
    _pass_time(cluster)
  instances.signal_gmanager(signal.SIGCONT)
  _borrow_and_return(cluster, 2)
