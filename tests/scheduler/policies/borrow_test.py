import dataclasses
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.errors import ConfigError
from infinite_llm.lending_config import LendingConfig
from infinite_llm.scheduler import policies
from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.policies import borrow
from tests.scheduler import cluster_views


def _view(links=None, **lendable):
  return cluster_views.view(
    [
      cluster_views.line(int(name[1:]), room, 100)
      for name, room in lendable.items()
    ],
    links=links,
  )


def _rank(view, debtor, wanted):
  """Instances proposed, in order."""
  rooms = borrow.rank_creditors(view, PlanningConfig(), debtor, wanted)
  return tuple(instance for instance, _ in rooms)


def test_most_room_comes_first():
  view = _view(i0=9, i1=5, i2=7, i3=6)

  assert _rank(view, 0, 100) == (2, 3, 1)


def test_the_nearest_of_equals_comes_first_then_the_lower_number():
  #  debtor 3:     distance 3, 1, -, 1, 2
  view = _view(i0=5, i2=5, i3=5, i4=5, i5=5)

  assert _rank(view, 3, 1) == (2, 4, 5)


def test_the_cheapest_link_comes_first_where_there_is_room_enough():
  # Instances 0 and 1 are in one domain, 2 and 3 in another.
  links = LinkCosts(domains=(0, 0, 1, 1), within_s=1, between_s=9)
  view = _view(links, i0=0, i1=4, i2=8, i3=6)

  assert _rank(view, 0, 4) == (1, 2, 3)
  # For 6 rBlocks instance 1 has too little room, for 5 of them it has 4.
  assert _rank(view, 0, 6) == (2, 3, 1)


def test_who_cannot_be_reached_is_not_proposed():
  links = LinkCosts(domains=(0, 0, 1))  # as of two lending groups
  view = _view(links, i0=0, i1=1, i2=9, i3=9)

  assert _rank(view, 0, 4) == (1,)
  assert _rank(view, 3, 4) == ()


def test_nobody_without_room_is_proposed():
  assert _rank(_view(i0=9, i1=0, i2=1), 0, 4) == (2,)
  assert _rank(_view(i0=9, i1=0), 0, 4) == ()


def test_an_unknown_debtor_gets_candidates_all_the_same():
  assert _rank(_view(i1=2), 0, 4) == (1,)


@hypothesis.given(
  room=st.dictionaries(st.integers(0, 20), st.integers(0, 5), max_size=12),
  debtor=st.integers(0, 20),
  wanted=st.integers(1, 6),
)
def test_candidates_are_few_different_others_with_room(room, debtor, wanted):
  view = _view(**{f"i{instance}": room[instance] for instance in sorted(room)})

  candidates = _rank(view, debtor, wanted)

  assert len(candidates) == len(set(candidates)) <= 3
  assert all(room[c] > 0 and c != debtor for c in candidates)
  left = [n for i, n in room.items() if i not in (*candidates, debtor)]
  assert all(room[c] >= n for c in candidates for n in left)
  assert candidates == _rank(view, debtor, wanted)


class TestRemoteShare:
  """What others attend hides behind what the debtor attends itself."""

  PLANNING = PlanningConfig(
    block_size=10, performance=cluster_views.MODEL, bound_remote_share=True
  )

  def rooms(self, lines, wanted, planning=PLANNING):
    return borrow.rank_creditors(cluster_views.view(lines), planning, 0, wanted)

  def test_creditors_with_a_batch_of_their_own_are_asked_for_less(self):
    # A layer of the debtor takes 1 + 9 s, one of instance 1 takes 4 requests
    # of a second together, and of 2 eight: 9 and 8 s are left for rBlocks, of
    # which ten take one.
    lines = [
      cluster_views.line(0, 10, 100, num_running=4),
      cluster_views.line(1, 60, 100, num_running=4, lendable=55),
      cluster_views.line(2, 60, 100, num_running=8),
      cluster_views.line(3, 5, 100, num_running=4),
    ]
    assert self.rooms(lines, 40) == ((2, 40), (1, 40))
    assert self.rooms(lines, 45) == ((1, 45), (2, 40))
    assert self.rooms(lines, 90) == ((1, 50), (2, 40))

  def test_the_exchange_takes_time_too(self):
    model = dataclasses.replace(cluster_views.MODEL, exchange_s=2.0)
    planning = dataclasses.replace(self.PLANNING, performance=model)
    lines = [
      cluster_views.line(0, 10, 100, num_running=4),
      cluster_views.line(1, 60, 100, num_running=4),
    ]
    assert self.rooms(lines, 30, planning) == ((1, 30),)
    assert self.rooms(lines, 31) == ((1, 31),)

  def test_memory_counts_more_than_time(self):
    lines = [
      cluster_views.line(0, 10, 100, num_running=4),
      cluster_views.line(1, 60, 100, num_running=4),
      cluster_views.line(2, 30, 100, num_running=90),
    ]
    assert self.rooms(lines, 50) == ((1, 50),)
    assert self.rooms(lines, 51) == ((1, 51), (2, 51))

  def test_it_is_bounded_where_a_performance_model_plans(self):
    def bounds(policy, bound=None):
      lending = LendingConfig(policy=policy, bound_remote_share=bound)
      return PlanningConfig.of(lending, 64, None).bound_remote_share

    assert bounds("greedy")
    assert not bounds("borrow")
    assert bounds("borrow", True)
    assert not bounds("greedy", False)

  def test_it_can_be_left_unbounded(self):
    planning = dataclasses.replace(self.PLANNING, bound_remote_share=False)
    lines = [
      cluster_views.line(0, 10, 100, num_running=4),
      cluster_views.line(1, 60, 100, num_running=90),
      cluster_views.line(2, 30, 100, num_running=4),
    ]
    assert self.rooms(lines, 20, planning) == ((1, 20), (2, 20))
    assert self.rooms(lines, 20) == ((2, 20),)

  def test_without_a_profile_attention_alone_counts(self):
    lines = [
      cluster_views.line(0, 10, 100),
      cluster_views.line(1, 60, 100, num_running=90),
      cluster_views.line(2, 90, 200),
    ]
    planning = PlanningConfig(bound_remote_share=True)
    assert self.rooms(lines, 20, planning) == ((1, 20),)
    assert self.rooms(lines, 51, planning) == ((2, 51), (1, 51))

  @hypothesis.given(view=cluster_views.views(), wanted=st.integers(1, 99))
  def test_nobody_becomes_the_slowest_where_there_is_room(self, view, wanted):
    model = cluster_views.MODEL
    by_instance = {line.instance: line for line in view.lines}
    for debtor, owner in by_instance.items():
      most_s = self.layer_s(model, owner, 0)
      rooms = borrow.rank_creditors(view, self.PLANNING, debtor, wanted)
      assert all(0 < most <= wanted for _, most in rooms)
      hidden = [
        sum(
          self.layer_s(model, line, more) <= most_s
          for more in range(1, line.lendable + 1)
        )
        for line in view.lines
        if line.instance != debtor
        and view.links.cost_s(debtor, line.instance) < math.inf
      ]
      if sum(sorted(hidden)[-3:]) >= wanted:  # No more are asked.
        assert rooms
        assert all(
          self.layer_s(model, by_instance[instance], most) <= most_s
          for instance, most in rooms
        )
      else:
        assert all(most == wanted for _, most in rooms)

  def layer_s(self, model, line, more):
    tokens = (line.capacity - line.free + more) * self.PLANNING.block_size
    return model.layer_s(line.num_running, tokens) + model.exchange_s


def test_the_request_with_most_movable_blocks_makes_room():
  assert borrow.choose_victim([(7, 2), (8, 5), (9, 0)]) == 8
  assert borrow.choose_victim([(9, 5), (8, 5)]) == 8
  assert borrow.choose_victim([(7, 0)]) is None
  assert borrow.choose_victim([]) is None


@pytest.mark.parametrize(
  ("name", "borrows", "swaps"),
  [
    ("borrow", True, False),
    ("greedy", True, False),
    ("migrate", False, False),
    ("static", False, False),
    ("swap", False, True),
  ],
)
def test_policies_differ_in_what_an_instance_does_that_runs_short(
  name, borrows, swaps
):
  policy = policies.get_policy(name)

  assert (borrows, swaps) == (policy.borrows, policy.swaps_to_host)
  assert policy.migrates == (name == "migrate")
  view, planning = _view(i0=9, i1=9), PlanningConfig()
  rooms = policy.rank_creditors(view, planning, 0, 1)
  assert rooms == (((1, 1),) if borrows else ())
  assert policy.choose_victim([(7, 5)]) == (7 if borrows else None)


@pytest.mark.parametrize("name", ["borrow", "static", "swap"])
def test_these_policies_plan_no_moves(name):
  # Instance 0 is full and others wait; all else is empty.
  view = cluster_views.view(
    [
      cluster_views.line(0, 0, num_running=1, num_waiting=5, next_blocks=2),
      cluster_views.line(1, 10),
    ],
    [cluster_views.placement(0, 7, {0: 10}, movable=9)],
  )

  assert policies.get_policy(name).plan_moves(view, PlanningConfig()) == ()


def test_only_those_who_share_take_their_blocks_home():
  view = cluster_views.debt_view((0, 1, 3), (1, 0, 3))

  planning = [
    name
    for name, policy in policies.POLICIES.items()
    if policy.plan_recalls(view, PlanningConfig())
  ]

  assert planning == ["borrow", "greedy"]


def test_an_unknown_policy_is_refused_with_the_known_names():
  with pytest.raises(
    ConfigError, match=r"borrow, greedy, migrate, static, swap; got 'best'"
  ):
    policies.get_policy("best")
