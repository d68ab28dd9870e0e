import dataclasses

import pytest

from infinite_llm.config import LendingConfig
from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.cluster_view import LedgerLine
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.lease_messages import (
  ReserveReply,
)
from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  Heartbeat,
  Leadership,
  MoveKvcache,
  RecallKvcache,
  RequestBlocks,
)
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.types import PoolCounts
from tests.scheduler.cluster_views import MODEL, placement

_BEAT_S = 0.25  # Three are a leader's lease.
_EPOCH = 2  # Even ones are the first gManager's, odd ones the standby's.


class _Clock:
  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


def _gmanager(clock, policy="borrow", **options):
  lending = {
    "heartbeat_every_s": 1.0,
    "expire_after_s": 5.0,
    "plan_every_s": 2.0,
    "freeze_s": 4.0,
  }
  return GManager(LendingConfig(policy=policy, **lending), clock, **options)


def _envelope(sender, seq, body, incarnation=1, receiver=GMANAGER):
  return Envelope(
    sender=sender,
    receiver=receiver,
    incarnation=incarnation,
    seq=seq,
    body=body,
  )


def _heartbeat(
  sender, seq, lendable, *, incarnation=1, receiver=GMANAGER, **fields
):
  """Lends all that is free; the rest of its 99 rBlocks is reserved."""
  counts = PoolCounts(
    used=0, free=lendable, hosted=0, reserved=99 - lendable, total=99
  )
  num_running = len(fields.get("requests", ()))
  fields = {"num_running": num_running, **fields}
  body = Heartbeat(counts=counts, lendable=lendable, **fields)
  return _envelope(sender, seq, body, incarnation, receiver)


def _drain(gmanager):
  return [(m.receiver, m.body) for m in gmanager.drain_messages()]


def _wait(gmanager, clock, num_ticks, tick_s=1.0):
  """Time passes from tick to tick."""
  for _ in range(num_ticks):
    clock.now += tick_s
    gmanager.tick()


class TestLedger:
  def test_heartbeats_fill_the_ledger_and_the_placement_map(self, clock):
    gmanager = _gmanager(clock)
    blocks = RequestBlocks(uid=7, holders=((0, 2), (1, 5)), movable=1)
    gmanager.on_message(_heartbeat(1, 1, 4, lent=((0, 5),)))
    clock.now += 1
    gmanager.on_message(
      _heartbeat(
        0,
        1,
        9,
        num_running=2,
        num_waiting=4,
        next_blocks=6,
        requests=(blocks,),
        incarnation=3,
      )
    )

    view = gmanager.view()
    assert view.lines == (
      LedgerLine(
        instance=0,
        incarnation=3,
        heard_s=101.0,
        capacity=99,
        free=9,
        lendable=9,
        num_running=2,
        num_waiting=4,
        next_blocks=6,
      ),
      LedgerLine(
        instance=1,
        heard_s=100.0,
        capacity=99,
        free=4,
        lendable=4,
        debts=((0, 5),),
      ),
    )
    assert view.placements == (placement(0, 7, {0: 2, 1: 5}, movable=1),)

  def test_a_newcomer_is_news_to_everybody_else_only_the_sender_is_told(
    self, clock
  ):
    gmanager = _gmanager(clock)
    gmanager.on_message(_heartbeat(0, 1, 9))
    assert _drain(gmanager) == [(0, ClusterStatus(lendable=0))]

    gmanager.on_message(_heartbeat(1, 1, 4))
    assert _drain(gmanager) == [
      (0, ClusterStatus(lendable=4)),
      (1, ClusterStatus(lendable=9)),
    ]

    gmanager.on_message(_heartbeat(1, 2, 3))
    assert _drain(gmanager) == [(1, ClusterStatus(lendable=9))]
    gmanager.on_message(_heartbeat(0, 2, 9))
    assert _drain(gmanager) == [(0, ClusterStatus(lendable=3))]

  @pytest.mark.parametrize(
    ("seq", "incarnation", "lendable"), [(1, 1, 5), (3, 1, 8), (1, 2, 8)]
  )
  def test_an_older_heartbeat_changes_nothing(
    self, clock, seq, incarnation, lendable
  ):
    gmanager = _gmanager(clock)
    gmanager.on_message(_heartbeat(0, 2, 5))
    gmanager.on_message(_heartbeat(0, seq, 8, incarnation=incarnation))

    assert gmanager.view().lines[0].lendable == lendable

  def test_a_change_changes_what_it_names(self, clock):
    gmanager = _gmanager(clock)
    requests = [
      RequestBlocks(uid=uid, holders=((0, uid),)) for uid in (7, 8, 9)
    ]
    gmanager.on_message(
      _heartbeat(0, 4, 5, lent=((1, 2), (2, 3)), requests=tuple(requests))
    )
    changed = RequestBlocks(uid=8, holders=((0, 1), (3, 1)))
    ended = RequestBlocks(uid=9, holders=())
    gmanager.on_message(
      _heartbeat(
        0, 6, 4, base=4, lent=((2, 0), (3, 1)), requests=(changed, ended)
      )
    )

    view = gmanager.view()
    assert view.lines[0].debts == ((1, 2), (3, 1))
    assert view.lines[0].lendable == 4
    assert [item.blocks for item in view.placements] == [requests[0], changed]

  def test_a_missed_change_makes_it_ask_for_everything(self, clock):
    gmanager = _gmanager(clock)
    gmanager.on_message(_heartbeat(0, 4, 5, lent=((1, 2),)))
    gmanager.drain_messages()
    clock.now += 1
    gmanager.on_message(_heartbeat(0, 6, 4, base=5, lent=((1, 1),)))

    (line,) = gmanager.view().lines
    assert (line.lendable, line.debts) == (4, ((1, 2),))
    assert line.heard_s == 101.0
    assert _drain(gmanager) == [
      (0, FullHeartbeatRequest()),
      (0, ClusterStatus(lendable=0)),
    ]
    gmanager.on_message(_heartbeat(0, 7, 4, lent=((1, 1),)))
    assert gmanager.view().lines[0].debts == ((1, 1),)

  @pytest.mark.parametrize(("incarnation", "base"), [(1, 3), (2, 4)])
  def test_a_change_of_what_it_never_had_is_a_gap(
    self, clock, incarnation, base
  ):
    gmanager = _gmanager(clock)
    if incarnation == 2:
      gmanager.on_message(_heartbeat(0, 4, 5, incarnation=1))
    gmanager.drain_messages()
    gmanager.on_message(_heartbeat(0, 5, 8, base=base, incarnation=incarnation))

    assert _drain(gmanager)[0] == (0, FullHeartbeatRequest())
    assert all(line.lendable == 5 for line in gmanager.view().lines)

  def test_an_instance_that_starts_anew_brings_nothing_of_before(self, clock):
    gmanager = _gmanager(clock)
    blocks = RequestBlocks(uid=7, holders=((0, 2),))
    gmanager.on_message(_heartbeat(0, 9, 5, lent=((1, 2),), requests=(blocks,)))
    gmanager.on_message(_heartbeat(0, 1, 9, incarnation=2))

    view = gmanager.view()
    assert view.lines[0].debts == ()
    assert view.placements == ()

  def test_a_silent_instance_is_forgotten_and_all_are_told(self, clock):
    gmanager = _gmanager(clock)
    blocks = RequestBlocks(uid=7, holders=((1, 2),))
    gmanager.on_message(_heartbeat(1, 1, 4, requests=(blocks,)))
    for seq in range(1, 5):
      gmanager.on_message(_heartbeat(0, seq, 9))
      _wait(gmanager, clock, 1)
    gmanager.drain_messages()
    assert len(gmanager.view().lines) == 2

    _wait(gmanager, clock, 1)

    assert [line.instance for line in gmanager.view().lines] == [0]
    assert gmanager.view().placements == ()
    assert _drain(gmanager) == [(0, ClusterStatus(lendable=0))]

  def test_whoever_slept_forgets_nobody(self, clock):
    gmanager = _gmanager(clock)
    gmanager.on_message(_heartbeat(0, 1, 9))
    clock.now += 60
    gmanager.tick()
    assert len(gmanager.view().lines) == 1

    _wait(gmanager, clock, 5)
    assert gmanager.view().lines == ()


class TestCandidates:
  def test_candidates_answer_the_request_they_were_asked_for_with(self, clock):
    gmanager = _gmanager(clock)
    for instance, lendable in ((0, 0), (1, 4), (2, 9)):
      gmanager.on_message(_heartbeat(instance, 1, lendable))
    gmanager.drain_messages()

    gmanager.on_message(
      _envelope(0, 7, CandidatesRequest(num_blocks=6), incarnation=2)
    )

    (answer,) = gmanager.drain_messages()
    assert answer == Envelope(
      sender=GMANAGER,
      receiver=0,
      incarnation=2,
      seq=7,
      body=Candidates(rooms=((2, 6), (1, 6))),
      leader_epoch=_EPOCH,
    )

  def test_links_count_when_candidates_are_ranked(self, clock):
    lending = LendingConfig(link_domains=[0, 0, 1], link_between_s=2.0)
    gmanager = GManager(lending, clock)
    links = LinkCosts(domains=(0, 0, 1), between_s=2.0)
    assert gmanager.view().links == links
    for instance, lendable in ((0, 0), (1, 4), (2, 9)):
      gmanager.on_message(_heartbeat(instance, 1, lendable))
    gmanager.drain_messages()

    gmanager.on_message(_envelope(0, 7, CandidatesRequest(num_blocks=4)))

    assert _drain(gmanager) == [
      (
        0,
        Candidates(rooms=((1, 4), (2, 4))),
      )
    ]

  @pytest.mark.parametrize("policy", ["static", "swap", "migrate"])
  def test_without_borrowing_nobody_is_proposed_and_no_room_is_promised(
    self, clock, policy
  ):
    gmanager = _gmanager(clock, policy)
    gmanager.on_message(_heartbeat(0, 1, 9))
    gmanager.on_message(_heartbeat(1, 1, 9))
    assert _drain(gmanager) == [
      (0, ClusterStatus(lendable=0)),
      (1, ClusterStatus(lendable=0)),
    ]

    gmanager.on_message(_envelope(0, 7, CandidatesRequest(num_blocks=3)))

    assert _drain(gmanager) == [(0, Candidates(rooms=()))]

  @pytest.mark.parametrize(
    ("sender", "body"),
    [
      (0, ReserveReply(grants=())),
      (GMANAGER, Leadership()),
      (STANDBY, CandidatesRequest(num_blocks=1)),
    ],
  )
  def test_what_is_not_for_a_gmanager_is_refused_and_counted(
    self, clock, sender, body
  ):
    gmanager = _gmanager(clock)
    gmanager.drain_messages()
    gmanager.on_message(_envelope(sender, 1, body))

    assert gmanager.refused == {type(body).__name__: 1}
    assert gmanager.view().lines == ()
    assert gmanager.drain_messages() == []

  def test_a_change_that_does_not_fit_what_is_in_force_is_refused(self, clock):
    gmanager = _gmanager(clock)
    gmanager.on_message(_heartbeat(0, 1, 90, lent=((1, 5),)))
    before = gmanager.view()
    # With the five of instance 1 these are 10, but only 9 are held at all.
    gmanager.on_message(_heartbeat(0, 2, 90, base=1, lent=((2, 5),)))

    assert gmanager.refused == {"Heartbeat": 1}
    assert gmanager.view() == before


class TestPlans:
  def test_circles_of_debts_are_recalled_and_their_members_frozen(self, clock):
    gmanager = _gmanager(clock)
    mine = RequestBlocks(uid=7, holders=((1, 5),))
    other = RequestBlocks(uid=8, holders=((0, 3),))
    gmanager.on_message(_heartbeat(0, 1, 0, lent=((1, 3),), requests=(mine,)))
    gmanager.on_message(_heartbeat(1, 1, 0, lent=((0, 5),), requests=(other,)))
    gmanager.drain_messages()

    _wait(gmanager, clock, 1)
    assert _drain(gmanager) == []
    _wait(gmanager, clock, 1)

    assert _drain(gmanager) == [
      (0, RecallKvcache(uid=7, num_blocks=3, src=1, freeze_s=4.0)),
      (1, RecallKvcache(uid=8, num_blocks=3, src=0, freeze_s=4.0)),
    ]
    assert gmanager.num_plans == 1

  def _greedy(self, clock, **owner):
    """The example of `greedy_test.py`: five rBlocks go from 0 to 1."""
    planning = PlanningConfig(block_size=10, performance=MODEL, debtor_batch=4)
    gmanager = _gmanager(clock, "greedy", planning=planning)
    full = PoolCounts(used=8, free=0, hosted=0, reserved=0, total=8)
    empty = PoolCounts(used=2, free=18, hosted=0, reserved=0, total=20)
    fields = {
      "counts": full,
      "lendable": 0,
      "num_running": 1,
      "num_waiting": 2,
      "next_blocks": 2,
      "requests": (RequestBlocks(uid=7, holders=((0, 8),), movable=7),),
    }
    busy = Heartbeat(
      counts=empty,
      lendable=18,
      num_running=3,
      requests=(RequestBlocks(uid=8, holders=((1, 2),), movable=1),),
    )
    gmanager.on_message(_envelope(0, 1, Heartbeat(**fields | owner)))
    gmanager.on_message(_envelope(1, 1, busy))
    return gmanager

  def test_moves_are_planned_before_anybody_asks(self, clock):
    gmanager = self._greedy(clock)
    gmanager.drain_messages()

    _wait(gmanager, clock, 2)

    assert _drain(gmanager) == [(0, MoveKvcache(uid=7, num_blocks=5, dst=1))]

  def test_nothing_moves_to_or_from_an_instance_that_takes_blocks_home(
    self, clock
  ):
    counts = PoolCounts(used=8, free=0, hosted=1, reserved=0, total=9)
    gmanager = self._greedy(clock, counts=counts, lent=((2, 1),))
    circle = RequestBlocks(uid=9, holders=((0, 1),))
    back = RequestBlocks(uid=10, holders=((2, 1),))
    full = RequestBlocks(uid=7, holders=((0, 8),), movable=7)
    gmanager.on_message(_heartbeat(2, 1, 0, lent=((0, 1),), requests=(circle,)))
    again = Heartbeat(
      counts=counts,
      lendable=0,
      num_running=2,
      num_waiting=2,
      next_blocks=2,
      lent=((2, 1),),
      requests=(full, back),
    )
    gmanager.on_message(_envelope(0, 2, again))
    gmanager.drain_messages()

    _wait(gmanager, clock, 2)

    assert {type(body) for _, body in _drain(gmanager)} == {RecallKvcache}

  def test_equal_heartbeats_give_equal_plans(self, clock):
    gmanager = self._greedy(clock)
    gmanager.drain_messages()
    plans = []
    for _ in range(2):
      _wait(gmanager, clock, 2)
      plans.append(_drain(gmanager))

    assert plans[0] == plans[1] != []


class TestConstruction:
  @pytest.mark.parametrize(
    ("policy", "options", "text"),
    [
      ("greedy", {}, "performance .* must be a model for the policy 'greedy'"),
      (
        "borrow",
        {"peers": [GMANAGER]},
        r"peers must be .* others than address",
      ),
      ("borrow", {"peers": ["zz"]}, r"peers must be .*; got \['zz'\]"),
      ("borrow", {"address": "x"}, "address must be one of gmanager, standby"),
      (
        "borrow",
        {"num_instances": 0},
        "num_instances must be None or at least",
      ),
      ("borrow", {"incarnation": 0}, "incarnation must be at least 1; got 0"),
    ],
  )
  def test_what_cannot_work_is_refused(self, clock, policy, options, text):
    with pytest.raises(ConfigError, match=text):
      _gmanager(clock, policy, **options)

  @pytest.mark.parametrize(
    ("field", "value", "text"),
    [
      ("policy", "best", "policy must be one of borrow, greedy, migrate, stat"),
      ("full_heartbeat_every", 0, "full_heartbeat_every must be at least 1"),
      ("expire_after_s", 0.2, "expire_after_s must be more than twice heartb"),
      ("leader_lease", 0.0, r"leader_lease must be in \(0, 0.8\]; got 0.0"),
      ("leader_lease", 0.81, r"leader_lease must be in \(0, 0.8\]; got 0.81"),
      ("leader_lease", "1", "leader_lease must be a number; got '1'"),
      ("plan_every_s", 0, "plan_every_s must be positive and finite; got 0"),
      ("plan_every_s", float("inf"), "plan_every_s must be positive and finit"),
      ("lease_s", float("inf"), "lease_s must be positive and finite; got inf"),
      ("lease_s", "10", "lease_s must be a number; got '10'"),
      ("expire_after_s", float("inf"), "expire_after_s must be positive and f"),
      (
        "freeze_s",
        10.5,
        r"freeze_s must be at most lease_s \(10.0\); got 10.5",
      ),
      ("link_domains", (0, 1.5), r"link_domains\[...\] must be an integer; g"),
      ("link_between_s", 0, "link_between_s must be positive and finite; got"),
      ("creditor_use", 0.0, r"creditor_use must be in \(0, 1\]; got 0.0"),
      ("min_gain", float("nan"), "min_gain must be finite and not negative; g"),
      ("max_circles", 0, "max_circles must be at least 1; got 0"),
      ("freeze_s", -1, "freeze_s must be positive and finite; got -1"),
    ],
  )
  def test_impossible_rules_are_refused(self, field, value, text):
    with pytest.raises(ConfigError, match=text):
      LendingConfig(**{field: value})

  @pytest.mark.parametrize(
    ("field", "value", "text"),
    [
      ("block_size", 0, "block_size must be at least 1; got 0"),
      ("max_moves", 0, "max_moves must be at least 1; got 0"),
      ("creditor_use", 0.0, r"creditor_use must be in \(0, 1\]; got 0.0"),
      ("creditor_use", 1.1, r"creditor_use must be in \(0, 1\]; got 1.1"),
      ("min_gain", float("nan"), "min_gain must be finite and not negative"),
    ],
  )
  def test_impossible_plans_are_refused(self, field, value, text):
    with pytest.raises(ConfigError, match=text):
      PlanningConfig(**{field: value})

  @pytest.mark.parametrize(
    ("fields", "text"),
    [
      ({"within_s": -1.0}, "within_s must be finite and not negative; got -1"),
      ({"within_s": 2.0, "between_s": 1.0}, r"at least within_s \(2.0\)"),
    ],
  )
  def test_impossible_links_are_refused(self, fields, text):
    with pytest.raises(ConfigError, match=text):
      LinkCosts(**fields)


def test_links_are_fast_inside_a_domain():
  links = LinkCosts(domains=(0, 0, 1), within_s=1.0, between_s=5.0)

  assert links.cost_s(0, 1) == 1.0
  assert links.cost_s(0, 2) == 5.0
  # Instances beyond the list are alone.
  assert links.cost_s(0, 3) == links.cost_s(3, 4) == 5.0
  assert links.cost_s(3, 3) == 1.0
  assert LinkCosts().cost_s(0, 99) == 0.0


def test_an_absurd_need_takes_nothing_from_those_who_wait(clock):
  gmanager = _gmanager(clock, num_instances=3)
  waits = {"num_waiting": 1, "next_blocks": 120, "next_arrival": 5}
  gmanager.on_message(_heartbeat(0, 1, 99, **waits))
  gmanager.on_message(_heartbeat(1, 1, 99))
  gmanager.drain_messages()

  for seq, absurd in enumerate((2**62, 2**31 - 1, 298, -1), 2):
    gmanager.on_message(_heartbeat(1, seq, 99, num_running=1, promised=absurd))
  gmanager.on_message(_heartbeat(0, 2, 99, **waits))

  (status,) = [m.body for m in gmanager.drain_messages()]
  assert status == ClusterStatus(lendable=99, allotted_to=5)
  assert gmanager.refused == {"Heartbeat": 4}


def test_thresholds_of_plans_are_those_of_the_configuration():
  lending = LendingConfig(
    debtor_batch=5,
    creditor_use=0.5,
    min_gain=0.25,
    max_moves=7,
    max_circles=3,
  )

  assert PlanningConfig.of(lending, 16, MODEL) == PlanningConfig(
    block_size=16,
    performance=MODEL,
    debtor_batch=5,
    creditor_use=0.5,
    min_gain=0.25,
    max_moves=7,
    max_circles=3,
  )
  # By default both say the same.
  assert PlanningConfig.of(LendingConfig(), 64, None) == PlanningConfig()


class TestLeadership:
  @pytest.fixture
  def standby(self, clock):
    return _gmanager(clock, address=STANDBY, peers=[GMANAGER], is_leader=False)

  def _leadership(self, epoch, sender=GMANAGER):
    receiver = STANDBY if sender == GMANAGER else GMANAGER
    envelope = _envelope(sender, 1, Leadership(), receiver=receiver)
    return dataclasses.replace(envelope, leader_epoch=epoch)

  def test_a_leader_tells_the_standby_each_beat_that_it_lives(self, clock):
    leader = _gmanager(clock, peers=[STANDBY])
    leader.tick()
    (message,) = leader.drain_messages()
    assert (message.receiver, message.body) == (STANDBY, Leadership())
    assert message.leader_epoch == leader.epoch == _EPOCH

    clock.now += 0.125
    leader.tick()
    assert leader.drain_messages() == []
    clock.now += 0.0625
    leader.tick()
    assert _drain(leader) == [(STANDBY, Leadership())]

  def test_a_standby_listens_and_says_nothing(self, clock, standby):
    standby.on_message(_heartbeat(1, 1, 4, receiver=STANDBY))
    standby.on_message(_heartbeat(2, 2, 4, base=1, receiver=STANDBY))  # a gap
    standby.on_message(
      _envelope(0, 7, CandidatesRequest(num_blocks=3), receiver=STANDBY)
    )
    for _ in range(9):
      standby.on_message(self._leadership(_EPOCH))
      _wait(standby, clock, 1, _BEAT_S)

    assert not standby.is_leader
    assert standby.drain_messages() == []
    assert standby.num_plans == 0

  def test_it_leads_once_the_lease_is_over_with_what_it_heard(
    self, clock, standby
  ):
    standby.on_message(self._leadership(_EPOCH))
    for seq in (1, 2, 3):
      standby.on_message(_heartbeat(0, seq, 9, receiver=STANDBY))
      standby.on_message(_heartbeat(1, seq, 4, receiver=STANDBY))
      assert not standby.is_leader
      _wait(standby, clock, 1, _BEAT_S)

    assert standby.is_leader
    assert standby.epoch == 3
    told = standby.drain_messages()
    assert [(m.receiver, m.body, m.leader_epoch) for m in told] == [
      (GMANAGER, Leadership(), 3),
      (0, ClusterStatus(lendable=4), 3),
      (1, ClusterStatus(lendable=9), 3),
    ]
    standby.on_message(
      _envelope(0, 7, CandidatesRequest(num_blocks=3), receiver=STANDBY)
    )
    assert _drain(standby) == [(0, Candidates(rooms=((1, 3),)))]

  def test_whom_it_missed_a_change_of_it_asks_when_it_leads(
    self, clock, standby
  ):
    standby.on_message(_heartbeat(0, 1, 9, receiver=STANDBY))
    standby.on_message(_heartbeat(0, 3, 9, base=2, receiver=STANDBY))
    _wait(standby, clock, 3, _BEAT_S)

    assert (0, FullHeartbeatRequest()) in _drain(standby)

  def test_a_standby_that_slept_does_not_take_over(self, clock, standby):
    clock.now += 60
    standby.tick()
    assert not standby.is_leader

  @pytest.mark.parametrize("by", ["heartbeat", "leadership"])
  def test_a_leader_steps_down_when_it_hears_of_a_newer_one(self, clock, by):
    leader = _gmanager(clock, peers=[STANDBY])
    leader.on_message(_heartbeat(0, 1, 9))
    leader.drain_messages()
    leader.on_message(
      _heartbeat(0, 2, 9, leader_epoch=3)
      if by == "heartbeat"
      else self._leadership(3, STANDBY)
    )

    assert not leader.is_leader
    leader.on_message(_envelope(0, 7, CandidatesRequest(num_blocks=3)))
    assert leader.drain_messages() == []
    # And leads again, under a still newer epoch, if that one dies.
    _wait(leader, clock, 3, _BEAT_S)
    assert (leader.is_leader, leader.epoch) == (True, 2 + 512)

  def test_epochs_are_never_shared_nor_used_twice(self, clock):
    epochs = [
      _gmanager(clock, address=address, incarnation=incarnation).epoch
      for incarnation in (1, 2, 3)
      for address in (GMANAGER, STANDBY)
    ]

    assert epochs == [2, 3, 4, 5, 6, 7]

  def test_a_new_life_repeats_no_epoch_of_an_earlier_one(self, clock):
    # The first life follows epoch 2, leads under 3 and dies unheard; the next
    # one hears only of 2 before it leads.
    epochs = []
    for incarnation in (1, 2):
      standby = _gmanager(
        clock,
        address=STANDBY,
        peers=[GMANAGER],
        incarnation=incarnation,
        is_leader=False,
      )
      standby.on_message(self._leadership(2))
      _wait(standby, clock, 3, _BEAT_S)
      assert standby.is_leader
      epochs.append(standby.epoch)

    assert epochs == [3, 5]
