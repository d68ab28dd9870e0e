import pytest

from infinite_llm.config import LendingConfig
from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.leases import (
  MAX_CLOCK_SKEW,
  LeaseDeadlines,
  LeaseTrust,
)


class _Clock:
  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


def _expired_at(deadlines, clock, *times):
  """What each check at these seconds after the start takes."""
  expired = []
  for time in times:
    clock.now = 100.0 + time
    expired.append(deadlines.take_expired())
  return expired


class TestDeadlines:
  def test_a_silent_owner_expires_once_after_a_lease(self, clock):
    deadlines = LeaseDeadlines(10.0, clock)
    deadlines.renew(2)

    assert _expired_at(deadlines, clock, 4, 8, 9.9, 10, 14) == [
      (),
      (),
      (),
      (2,),
      (),
    ]

  def test_a_message_begins_the_lease_anew(self, clock):
    deadlines = LeaseDeadlines(10.0, clock)
    deadlines.renew(2)
    deadlines.renew(1)
    assert _expired_at(deadlines, clock, 4) == [()]
    deadlines.renew(2)

    assert _expired_at(deadlines, clock, 8, 10, 13.9, 14) == [
      (),
      (1,),
      (),
      (2,),
    ]

  def test_who_slept_gives_everybody_one_more_lease(self, clock):
    deadlines = LeaseDeadlines(10.0, clock)
    deadlines.renew(2)

    # The check after 8 seconds is late by more than half a lease.
    assert _expired_at(deadlines, clock, 2, 10.1, 15, 20, 20.2) == [
      (),
      (),
      (),
      (),
      (2,),
    ]

  def test_sleeping_for_half_a_lease_forgives_nothing(self, clock):
    deadlines = LeaseDeadlines(10.0, clock)
    deadlines.renew(2)

    assert _expired_at(deadlines, clock, 5, 10) == [(), (2,)]


class TestTrust:
  def test_it_is_counted_from_the_sending_and_shortened_by_the_skew(
    self, clock
  ):
    trust = LeaseTrust(11.0, clock)
    assert MAX_CLOCK_SKEW == 0.1
    clock.now = 103.0
    trust.acknowledge(1, 100.0)

    clock.now = 109.9
    assert trust.holds(1)
    clock.now = 110.0  # 11 / 1.1 after the sending
    assert not trust.holds(1)

  def test_an_older_answer_shortens_nothing(self, clock):
    trust = LeaseTrust(11.0, clock)
    clock.now = 105.0
    trust.acknowledge(1, 104.0)
    trust.acknowledge(1, 100.0)

    clock.now = 113.9
    assert trust.holds(1)

  def test_what_lapsed_is_told_once(self, clock):
    trust = LeaseTrust(11.0, clock)
    trust.acknowledge(2, 100.0)
    trust.acknowledge(1, 100.0)
    trust.acknowledge(3, 100.0)
    trust.forget(3)
    clock.now = 109.0
    trust.acknowledge(2, 101.0)

    clock.now = 110.5
    assert trust.take_lapsed() == (1,)
    assert trust.take_lapsed() == ()
    assert trust.holds(2)

  def test_an_answer_that_took_too_long_proves_nothing(self, clock):
    trust = LeaseTrust(11.0, clock)
    clock.now = 110.0
    assert not trust.is_recent(100.0)
    trust.acknowledge(1, 100.0)

    assert not trust.holds(1)

  @pytest.mark.parametrize(
    ("owner_rate", "creditor_rate"),
    [(1.0, 1.0), (1.0, 1 + MAX_CLOCK_SKEW), (1 + MAX_CLOCK_SKEW, 1.0)],
  )
  def test_trust_ends_before_the_lease_while_clocks_differ_by_the_bound(
    self, owner_rate, creditor_rate
  ):
    """The worst case: the message itself takes no time."""
    real = _Clock()
    trust = LeaseTrust(10.0, lambda: real.now * owner_rate)
    deadlines = LeaseDeadlines(10.0, lambda: real.now * creditor_rate)
    trust.acknowledge(1, real.now * owner_rate)
    deadlines.renew(0)
    assert trust.holds(1)
    while trust.holds(1):
      assert deadlines.take_expired() == ()
      real.now += 0.01

  def test_beyond_the_bound_a_lease_may_end_while_it_is_trusted(self):
    real = _Clock()
    trust = LeaseTrust(10.0, lambda: real.now)
    deadlines = LeaseDeadlines(10.0, lambda: real.now * 1.3)
    trust.acknowledge(1, real.now)
    deadlines.renew(0)
    while not deadlines.take_expired():
      real.now += 0.01

    assert trust.holds(1)


def test_a_lease_must_outlast_a_lost_message():
  LendingConfig(lease_s=1.1, heartbeat_every_s=0.1, resend_after_s=0.5)
  with pytest.raises(
    ConfigError,
    match=r"lease_s must be more than twice resend_after_s \(0.5\), so that one"
    r" lost message ends no lease; got 1.0",
  ):
    LendingConfig(lease_s=1.0, heartbeat_every_s=0.1, resend_after_s=0.5)
  with pytest.raises(ConfigError, match=r"twice heartbeat_every_s \(6.0\)"):
    LendingConfig(heartbeat_every_s=6.0)
