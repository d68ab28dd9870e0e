import collections
import graphlib

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.scheduler.planning import PlannedRecall, PlanningConfig
from infinite_llm.scheduler.policies.dgfm import (
  Circle,
  circles,
  debts,
  plan_recalls,
)
from tests.scheduler import cluster_views
from tests.scheduler.cluster_views import debt_view, line, placement

_CONFIG = PlanningConfig()


def _recalls(*expected):
  return tuple(
    PlannedRecall(uid=uid, owner=owner, num_blocks=count, src=src)
    for uid, owner, count, src in expected
  )


def test_two_who_borrow_from_each_other_take_the_smaller_debt_home():
  # 0 -5-> 1 -3-> 0, by debtor and creditor
  view = debt_view((0, 1, 5), (1, 0, 3))

  assert plan_recalls(view, _CONFIG) == _recalls((1, 0, 3, 1), (2, 1, 3, 0))


def test_a_chain_is_left_alone():
  assert plan_recalls(debt_view((0, 1, 5), (1, 2, 5)), _CONFIG) == ()


def test_a_circle_vanishes_and_what_hangs_on_it_stays():
  #      4      2      3
  #  0 ----> 1 ----> 2 ----> 0      3 -9-> 1
  view = debt_view((0, 1, 4), (1, 2, 2), (2, 0, 3), (3, 1, 9))

  assert plan_recalls(view, _CONFIG) == _recalls(
    (1, 0, 2, 1), (2, 1, 2, 2), (3, 2, 2, 0)
  )


def test_circles_that_share_a_debt_use_it_up_one_after_the_other():
  #  0 -5-> 1, from there home by 2 (2 rBlocks) or at once (4)
  graph = {0: {1: 5}, 1: {0: 4, 2: 2}, 2: {0: 9}}

  # The walk goes 0, 1, 0 first and leaves 0 -1-> 1 for the way by 2.
  assert circles(graph, 10) == (
    Circle(members=(0, 1), num_blocks=4),
    Circle(members=(0, 1, 2), num_blocks=1),
  )
  assert graph == {0: {1: 5}, 1: {0: 4, 2: 2}, 2: {0: 9}}


def test_a_circle_inside_a_longer_walk_is_found():
  #  0 -> 1 -> 2 -> 3 -> 1
  graph = {0: {1: 7}, 1: {2: 3}, 2: {3: 4}, 3: {1: 5}}

  assert circles(graph, 10) == (Circle(members=(1, 2, 3), num_blocks=3),)


def test_the_budget_ends_the_search():
  graph = {0: {1: 1}, 1: {0: 1}, 2: {3: 1}, 3: {2: 1}}

  assert circles(graph, 1) == (Circle(members=(0, 1), num_blocks=1),)
  view = debt_view((0, 1, 1), (1, 0, 1), (2, 3, 1), (3, 2, 1))
  assert len(plan_recalls(view, PlanningConfig(max_circles=1))) == 2


def test_requests_with_least_elsewhere_come_home_first():
  #  0 owes 1: request 7 has 4 rBlocks there, 8 has 1, 9 has 2; 1 owes 0 five
  view = cluster_views.view(
    [line(0, 0, debts=((1, 5),)), line(1, 0, debts=((0, 7),))],
    [
      placement(0, 7, {0: 1, 1: 4}),
      placement(0, 8, {1: 1}),
      placement(0, 9, {1: 2}),
      placement(1, 10, {0: 5}),
    ],
  )

  assert plan_recalls(view, _CONFIG) == _recalls(
    (8, 0, 1, 1), (9, 0, 2, 1), (7, 0, 2, 1), (10, 1, 5, 0)
  )


@pytest.mark.parametrize(("lent", "weight"), [(5, 3), (3, 3), (2, 2)])
def test_a_debt_is_what_both_sides_agree_on(lent, weight):
  view = cluster_views.view(
    [line(0, 0), line(1, 0, debts=((0, lent), (2, 9)))],
    [placement(0, 7, {0: 4, 1: 3})],
  )

  assert debts(view) == {0: {1: weight}}


def _without(graph, plan):
  """The debt graph after the plan, as a counter."""
  left = collections.Counter(
    {(a, b): count for a, row in graph.items() for b, count in row.items()}
  )
  for recall in plan:
    left[recall.owner, recall.src] -= recall.num_blocks
  return left


@hypothesis.given(
  edges=st.dictionaries(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(
      lambda edge: edge[0] != edge[1]
    ),
    st.integers(1, 9),
    max_size=20,
  )
)
@hypothesis.settings(max_examples=300)
def test_no_circle_is_left_and_no_debt_grows(edges):
  view = debt_view(*((a, b, count) for (a, b), count in edges.items()))
  graph = debts(view)

  plan = plan_recalls(view, _CONFIG)

  left = _without(graph, plan)
  assert all(recall.num_blocks > 0 for recall in plan)
  assert all(0 <= left[edge] <= edges[edge] for edge in edges)
  order = graphlib.TopologicalSorter()
  for (debtor, creditor), count in left.items():
    if count:
      order.add(debtor, creditor)
  order.prepare()  # Raises if there is a circle.
  # Each takes as much home as it gives back.
  balance = collections.Counter()
  for recall in plan:
    balance[recall.owner] += recall.num_blocks
    balance[recall.src] -= recall.num_blocks
  assert not any(balance.values())


@hypothesis.given(some_view=cluster_views.views(), data=st.data())
def test_equal_views_give_equal_plans_in_whatever_order(some_view, data):
  plan = plan_recalls(some_view, _CONFIG)

  assert plan == plan_recalls(some_view, _CONFIG)
  assert plan == plan_recalls(cluster_views.shuffled(data, some_view), _CONFIG)
  held = {
    (item.blocks.uid, holder): count
    for item in some_view.placements
    for holder, count in item.blocks.holders
  }
  assert all(r.num_blocks <= held[r.uid, r.src] for r in plan)


@hypothesis.given(
  most=st.integers(1, 4),
  graph=st.dictionaries(
    st.integers(0, 6),
    st.dictionaries(st.integers(0, 6), st.integers(1, 9), max_size=6),
  ),
)
def test_a_small_budget_is_kept_and_finds_the_same_circles(most, graph):
  graph = {
    a: {b: n for b, n in row.items() if b != a} for a, row in graph.items()
  }

  assert circles(graph, most) == circles(graph, 1000)[:most]
