import collections
import random

import pytest

from infinite_llm.distributed.transport.base import Transport
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.messages import (
  GMANAGER,
  CandidatesRequest,
  Envelope,
)
from infinite_llm.simulator.faults import Fault, NetworkFaults
from infinite_llm.simulator.network import SimulatedNetwork
from infinite_llm.simulator.trace import TraceHash
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster, until

_STEADY = NetworkFaults(min_delay_s=1.0, max_delay_s=1.0)
_GOLDEN = "5b15fe8d04f3db92ab30d602b5d2bb5a667cba82780056ae38c2527dd57b16fd"


def _message(seq, receiver=1, sender=0):
  return Envelope(
    sender=sender,
    receiver=receiver,
    incarnation=1,
    seq=seq,
    body=CandidatesRequest(num_blocks=seq),
  )


class _Town:
  """Addresses that note what they hear, and when."""

  def __init__(self, *addresses, seed=0, faults=_STEADY, observer=None):
    self.network = SimulatedNetwork(random.Random(seed), faults, observer)
    self.heard = []
    for address in addresses:
      self.network.register(address, self.handler(address))

  def handler(self, address):
    return lambda m: self.heard.append((self.network.now_s, address, m.seq))

  def seqs(self):
    return [seq for _, _, seq in self.heard]

  def counts(self):
    return {
      fault: count for fault, count in self.network.counts().items() if count
    }


class TestCarrying:
  def test_a_message_arrives_once_after_its_delay(self):
    town = _Town(0, 1)
    network: Transport = town.network
    network.send(_message(1))
    assert network.deliver() == 0

    town.network.run_until(0.9)
    assert town.heard == []
    town.network.run_until(3.0)
    assert town.heard == [(1.0, 1, 1)]
    assert town.network.now_s == 3.0
    assert (town.network.num_sent, town.network.num_delivered) == (1, 1)
    assert town.network.kinds_sent() == {"CandidatesRequest": 1}
    assert town.counts() == {}

  def test_step_goes_from_event_to_event(self):
    town = _Town(0, 1)
    town.network.send(_message(1))
    town.network.call_later(0, 0.5, lambda: town.network.send(_message(2)))

    times = []
    while town.network.step():
      times.append(town.network.now_s)
    assert times == [0.5, 1.0, 1.5]
    assert town.seqs() == [1, 2]

  def test_deliver_hands_over_what_is_due_and_no_more(self):
    town = _Town(0, 1, faults=NetworkFaults(min_delay_s=0.0, max_delay_s=0.0))
    town.network.send(_message(1))
    town.network.call_later(0, 1.0, lambda: town.network.send(_message(2)))

    assert town.network.deliver() == 1
    assert town.network.deliver() == 0
    assert town.network.now_s == 0.0

  def test_delays_lie_between_their_bounds_and_spread(self):
    town = _Town(0, 1, faults=NetworkFaults(min_delay_s=2.0, max_delay_s=6.0))
    for seq in range(1000):
      town.network.send(_message(seq))
    town.network.run_until(10.0)

    times = [now_s for now_s, _, _ in town.heard]
    assert 2.0 <= min(times) < 2.1
    assert 5.9 < max(times) <= 6.0
    quarters = collections.Counter(int(now_s - 2.0) for now_s in times)
    assert all(200 < quarters[quarter] < 300 for quarter in range(4))

  def test_an_unknown_receiver_is_an_error(self):
    with pytest.raises(InvariantError, match=r"be registered; got 'gmanager'"):
      _Town(0).network.send(_message(1, receiver=GMANAGER))


class TestMessageFaults:
  """Each really happens, about as often as asked, and is counted."""

  def _run(self, **faults):
    town = _Town(
      0, 1, faults=NetworkFaults(min_delay_s=1.0, max_delay_s=1.0, **faults)
    )
    for seq in range(1000):
      town.network.call_later(
        0, 0.01 * seq, lambda seq=seq: town.network.send(_message(seq))
      )
    town.network.run_until(100.0)
    return town, collections.Counter(town.seqs())

  def test_loss(self):
    town, arrivals = self._run(lost=0.2)
    num_lost = town.counts()[Fault.LOST]

    assert 150 < num_lost < 250
    assert set(arrivals.values()) == {1}
    assert len(arrivals) == 1000 - num_lost
    assert town.counts().keys() == {Fault.LOST}

  def test_repetition(self):
    town, arrivals = self._run(repeated=0.2)
    num_repeated = town.counts()[Fault.REPEATED]

    assert 150 < num_repeated < 250
    assert collections.Counter(arrivals.values()) == {
      1: 1000 - num_repeated,
      2: num_repeated,
    }

  def test_lateness(self):
    town, arrivals = self._run(late=0.2, late_s=50.0)
    late = [
      seq for now_s, _, seq in town.heard if now_s - 0.01 * seq > 1.0 + 1e-9
    ]

    assert 150 < len(late) == town.counts()[Fault.LATE] < 250
    assert max(now_s for now_s, _, _ in town.heard) > 40.0
    assert set(arrivals.values()) == {1}

  def test_overtaking(self):
    town = _Town(0, 1, faults=NetworkFaults(min_delay_s=0.0, max_delay_s=1.0))
    for seq in range(100):
      town.network.send(_message(seq))
    town.network.run_until(1.0)

    assert sorted(town.seqs()) == list(range(100))
    newest, overtaken = -1, 0
    for seq in town.seqs():
      overtaken += seq < newest
      newest = max(newest, seq)
    assert town.counts() == {Fault.OVERTAKEN: overtaken}
    assert overtaken > 50

  def test_without_faults_none_is_counted(self):
    town, arrivals = self._run()

    assert town.counts() == {}
    assert arrivals == collections.Counter(range(1000))

  @pytest.mark.parametrize(
    ("faults", "text"),
    [
      ({"lost": 1.1}, r"lost must be a probability; got 1\.1"),
      ({"repeated": -0.1}, r"repeated must be a probability; got -0\.1"),
      ({"late": float("nan")}, r"late must be a probability; got nan"),
      ({"late_s": -1.0}, r"late_s must not be negative; got -1\.0"),
      ({"min_delay_s": 2.0}, r"min_delay_s must be in \[0, max_delay_s\]; got"),
    ],
  )
  def test_impossible_ones_are_refused(self, faults, text):
    with pytest.raises(ConfigError, match=text):
      NetworkFaults(**faults)


class TestPartitions:
  def _exchange(self, town, addresses):
    """Everybody writes to everybody; who was heard by whom."""
    heard = set()
    for sender in addresses:
      for receiver in addresses:
        if sender != receiver:
          town.heard.clear()
          town.network.send(_message(1, receiver, sender))
          town.network.run_until(town.network.now_s + 1.0)
          heard |= {(sender, address) for _, address, _ in town.heard}
    return heard

  def test_nothing_passes_in_either_direction(self):
    everybody = (0, 1, 2, GMANAGER)
    town = _Town(*everybody)
    town.network.partition((0, 1), (GMANAGER,))

    heard = self._exchange(town, everybody)
    pairs = {(a, b) for a in everybody for b in everybody if a != b}
    cut = {(0, GMANAGER), (GMANAGER, 0), (1, GMANAGER), (GMANAGER, 1)}
    assert heard == pairs - cut
    assert town.counts() == {Fault.PARTITION: 1, Fault.CUT_OFF: 4}

    town.network.heal()
    assert self._exchange(town, everybody) == pairs

  def test_what_is_on_its_way_is_lost_too(self):
    town = _Town(0, 1)
    town.network.send(_message(1))
    town.network.run_until(0.5)
    town.network.partition((1,), (0,))
    town.network.run_until(2.0)

    assert town.heard == []
    assert town.counts()[Fault.CUT_OFF] == 1

  def test_what_was_sent_before_it_was_healed_does_not_arrive(self):
    town = _Town(0, 1)
    town.network.partition((1,), (0,))
    town.network.send(_message(1))
    town.network.heal()
    town.network.run_until(2.0)

    assert town.heard == []

  @pytest.mark.parametrize("sides", [((0,), (0, 1)), ((), (1,)), ((0,), ())])
  def test_sides_must_be_two(self, sides):
    with pytest.raises(ValueError, match="must not be empty and not overlap"):
      _Town(0, 1).network.partition(*sides)


class TestCrashes:
  def test_a_crashed_address_hears_nothing(self):
    town = _Town(0, 1)
    town.network.send(_message(1))
    town.network.crash(1)
    town.network.send(_message(2))
    town.network.run_until(5.0)

    assert town.heard == []
    assert town.network.is_crashed(1)
    assert town.counts() == {Fault.CRASH: 1, Fault.UNHEARD: 2}

  def test_what_it_sent_before_still_arrives(self):
    town = _Town(0, 1)
    town.network.send(_message(1))
    town.network.crash(0)
    town.network.run_until(5.0)

    assert town.heard == [(1.0, 1, 1)]

  def test_it_wakes_up_for_nothing_even_when_it_is_back(self):
    town = _Town(0, 1)
    woken = []
    town.network.call_later(0, 2.0, lambda: woken.append("before"))
    town.network.crash(0)
    town.network.run_until(1.0)
    town.network.restart(0, town.handler(0))
    town.network.call_later(0, 2.0, lambda: woken.append("after"))
    town.network.run_until(5.0)

    assert woken == ["after"]

  def test_messages_to_its_former_self_may_reach_it(self):
    town = _Town(0, 1)
    town.network.send(_message(1))
    town.network.crash(1)
    successor = []
    town.network.restart(1, successor.append)
    town.network.run_until(5.0)

    assert [m.seq for m in successor] == [1]
    assert town.heard == []
    assert town.counts() == {Fault.CRASH: 1, Fault.RESTART: 1}

  def test_what_only_a_mistaken_simulation_does_is_an_error(self):
    town = _Town(0, 1)
    network = town.network
    with pytest.raises(InvariantError, match=r"crashed to restart; got 0"):
      network.restart(0, town.handler(0))
    network.crash(0)
    with pytest.raises(InvariantError, match=r"must be up to crash; got 0"):
      network.crash(0)
    with pytest.raises(InvariantError, match=r"sender must not be crashed"):
      network.send(_message(1))
    with pytest.raises(InvariantError, match=r"must not be crashed; got 0"):
      network.register(0, town.handler(0))
    with pytest.raises(InvariantError, match=r"must not be crashed; got 0"):
      network.call_later(0, 1.0, lambda: None)


class TestClocks:
  def test_all_clocks_agree_at_first(self):
    town = _Town(0, 1)
    clocks = [town.network.clock(address) for address in (0, 1)]
    town.network.run_until(2.5)

    assert [clock() for clock in clocks] == [2.5, 2.5]

  def test_a_skewed_one_drifts_and_jumps_and_never_goes_back(self):
    town = _Town(0, 1)
    skewed, other = town.network.clock(0), town.network.clock(1)
    town.network.run_until(2.0)
    town.network.skew(0, rate=1.5, jump_s=10.0)
    assert skewed() == 12.0
    town.network.run_until(4.0)
    assert skewed() == 15.0
    town.network.skew(0, rate=0.5)
    assert skewed() == 15.0
    town.network.run_until(6.0)

    assert skewed() == 16.0
    assert other() == 6.0
    assert town.counts() == {Fault.SKEW: 2}

  def test_who_waits_waits_by_its_own_clock(self):
    town = _Town(0, 1)
    woken = {}
    town.network.skew(0, rate=2.0)
    for address in (0, 1):
      town.network.call_later(
        address, 3.0, lambda a=address: woken.update({a: town.network.now_s})
      )
    town.network.run_until(10.0)

    assert woken == {0: 1.5, 1: 3.0}

  @pytest.mark.parametrize("change", [{"rate": 0.0}, {"jump_s": -1.0}])
  def test_time_never_stands_still_or_goes_back(self, change):
    with pytest.raises(ValueError, match="must"):
      _Town(0).network.skew(0, **change)

  def test_nobody_wakes_up_in_the_past(self):
    with pytest.raises(ValueError, match=r"must not be negative; got -1\.0"):
      _Town(0).network.call_later(0, -1.0, lambda: None)


class TestHistories:
  """One seed, one history."""

  def _history(self, seed):
    """Five addresses gossip while everything goes wrong that can."""
    trace = TraceHash()
    rng = random.Random(seed)
    faults = NetworkFaults(lost=0.1, repeated=0.1, late=0.1, late_s=0.01)
    network = SimulatedNetwork(rng, faults, trace)

    def gossip(address):
      def handle(envelope):
        if envelope.seq < 60:
          network.send(_message(envelope.seq + 1, rng.randrange(5), address))

      return handle

    for address in range(5):
      network.register(address, gossip(address))
    for address in range(5):
      for seq in range(10):
        network.call_later(
          address,
          0.01 * seq,
          lambda a=address: network.send(_message(1, (a + 1) % 5, a)),
        )
    network.run_until(0.02)
    network.crash(3)
    network.skew(2, rate=1.1)
    network.partition((0,), (1, 2))
    network.run_until(0.04)
    network.restart(3, gossip(3))
    network.heal()
    network.run_until(10.0)
    assert all(network.counts().values()), network.counts()
    assert network.num_delivered > 300
    return trace.hexdigest()

  def test_the_same_seed_gives_this_history(self):
    assert self._history(1) == _GOLDEN

  def test_another_seed_gives_another(self):
    assert self._history(2) != _GOLDEN


class TestManagers:
  """The managers of the engine over this network, with fake devices."""

  @pytest.mark.parametrize("seed", range(20))
  def test_a_borrow_comes_through_every_fault_but_a_crash(self, seed):
    faults = NetworkFaults(
      min_delay_s=0.0,
      max_delay_s=1.5,
      lost=0.3,
      repeated=0.3,
      late=0.2,
      late_s=10.0,
    )
    network = SimulatedNetwork(random.Random(seed), faults)
    cluster = FakeCluster(3, 9, transport=network)

    def pass_time():
      cluster.tick()
      network.run_until(cluster.now_s)
      cluster.settle()
      cluster.check()

    manager = cluster.managers[0]
    cluster.open(0, 7, 6 * BLOCK_SIZE)
    for _ in until(lambda: manager.borrow(7, 4)):
      pass_time()
    network.partition((0,), (1, 2, GMANAGER))
    pass_time()
    network.heal()
    for _ in until(lambda: manager.phase(7) is Phase.IDLE):
      pass_time()
      assert cluster.covers(0, 7, 6 * BLOCK_SIZE) or not manager.is_readable(7)
    assert sum(manager.borrowed().values()) == 4

    manager.close(7)
    for _ in until(lambda: not manager.borrowed()):
      pass_time()
    cluster.check_agreement()
    cluster.check_empty()
    assert network.counts()[Fault.LOST] > 5
