"""A gManager that is killed, stopped and started anew, in real processes."""

import os
import signal
import subprocess
import sys

import pytest

from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.scheduler.messages import GMANAGER
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

pytestmark = pytest.mark.multihost

_OPTIONS = {"min_backoff_s": 0.01, "max_backoff_s": 0.05, "deadline_s": 0.3}
_ROUNDS = 2000


class Instances:
  """Two instances' transports here; the gManager is a process elsewhere."""

  def __init__(self):
    self.transports = [
      GrpcTransport(GrpcOptions(listen="127.0.0.1:0", **_OPTIONS))
      for _ in range(2)
    ]
    # Takes a free port for the gManager, and lets go of it.
    with GrpcTransport(GrpcOptions(listen="127.0.0.1:0")) as placeholder:
      self._gmanager_target = f"127.0.0.1:{placeholder.port}"
    self.targets = [f"127.0.0.1:{t.port}" for t in self.transports]
    for instance, transport in enumerate(self.transports):
      transport.connect(1 - instance, self.targets[1 - instance])
      transport.connect(GMANAGER, self._gmanager_target)
    self.process = None
    self._num_started = 0

  def start_gmanager(self):
    peers = [f"{i}={target}" for i, target in enumerate(self.targets)]
    self._num_started += 1
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "tests.multihost.gmanager_process",
        self._gmanager_target,
        str(self._num_started),
        *peers,
      ],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self.process.stdout.readline() == "ready\n"

  def signal_gmanager(self, number):
    os.kill(self.process.pid, number)

  def kill_gmanager(self):
    with self.process:  # Waits, and closes its pipe.
      self.process.kill()

  def register(self, address, handler):
    if address != GMANAGER:
      self.transports[address].register(address, handler)

  def send(self, envelope):
    self.transports[envelope.sender].send(envelope)

  def deliver(self):
    self.transports[0].wait(0.01)
    return sum(transport.deliver() for transport in self.transports)

  def close(self):
    for transport in self.transports:
      transport.close()
    if self.process is not None:
      self.kill_gmanager()


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
