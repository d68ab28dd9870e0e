import threading

import pytest

from infinite_llm.distributed.transport.peer_queue import PeerQueue, Waiting


class _Rig:
  def __init__(self, max_frames):
    self.now_s = 0.0
    self.dropped = []
    self.expired = []
    self.queue = PeerQueue(
      max_frames,
      clock=lambda: self.now_s,
      on_drop=lambda waiting: self.dropped.append(waiting.frame),
      on_expiry=lambda waiting: self.expired.append(waiting.frame),
    )

  def put(self, name, *, is_replaceable=False, lasts_s=9.0):
    waiting = Waiting(
      frame=name, is_replaceable=is_replaceable, expires_s=self.now_s + lasts_s
    )
    self.queue.put(waiting)

  def take(self, count):
    return [self.queue.take()[0].frame for _ in range(count)]


@pytest.fixture
def rig():
  return _Rig(max_frames=3)


def test_the_oldest_is_taken_first(rig):
  rig.put(b"a")
  rig.put(b"b", is_replaceable=True)

  assert rig.take(2) == [b"a", b"b"]


def test_a_full_queue_drops_its_oldest_replaceable_frame(rig):
  rig.put(b"request")
  rig.put(b"heartbeat 1", is_replaceable=True)
  rig.put(b"heartbeat 2", is_replaceable=True)
  rig.put(b"reply")

  assert rig.dropped == [b"heartbeat 1"]
  assert rig.take(3) == [b"request", b"heartbeat 2", b"reply"]


def test_a_full_queue_of_requests_drops_the_oldest(rig):
  for name in (b"a", b"b", b"c", b"d"):
    rig.put(name)

  assert rig.dropped == [b"a"]
  assert rig.take(3) == [b"b", b"c", b"d"]


def test_what_waited_too_long_is_not_taken(rig):
  rig.put(b"a", lasts_s=1.0)
  rig.put(b"b", lasts_s=3.0)
  rig.now_s = 1.0

  waiting, remaining_s = rig.queue.take()
  assert (waiting.frame, remaining_s) == (b"b", 2.0)
  assert rig.expired == [b"a"]
  assert rig.dropped == []


def test_load_tells_what_waits_and_what_is_being_sent(rig):
  assert rig.queue.load() == (0, 0)
  rig.put(b"a")
  rig.put(b"b")
  assert rig.queue.load() == (2, 0)
  rig.take(1)
  assert rig.queue.load() == (1, 1)


def test_closing_ends_a_take_that_waits(rig):
  taken = []
  thread = threading.Thread(target=lambda: taken.append(rig.queue.take()))
  thread.start()
  rig.queue.close()
  thread.join()

  assert taken == [None]
  rig.put(b"a")
  assert rig.queue.take() is None
