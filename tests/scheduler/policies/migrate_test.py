import hypothesis
from hypothesis import strategies as st

from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.planning import PlannedMove, PlanningConfig
from infinite_llm.scheduler.policies.migrate import plan_moves
from tests.scheduler import cluster_views
from tests.scheduler.cluster_views import line, placement

_CONFIG = PlanningConfig()


def _move(uid, owner, num_blocks, dst):
  return PlannedMove(
    uid=uid, owner=owner, num_blocks=num_blocks, dst=dst, with_request=True
  )


def _view(*others, links=None, next_blocks=5, **requests):
  """On instance 0, 2 of 30 rBlocks are free and a request waits for some."""
  return cluster_views.view(
    [
      line(0, 2, 30, num_waiting=1, next_blocks=next_blocks),
      *others,
    ],
    [
      placement(0, int(name[1:]), {0: size}, movable=size - 1)
      for name, size in requests.items()
    ],
    links,
  )


def test_the_smallest_request_that_makes_room_goes_to_the_emptiest_instance():
  # 3 rBlocks are lacking; request 8 has too few, 7 more than needed.
  view = _view(line(1, 9), line(2, 10), r7=9, r8=2, r9=4)

  assert plan_moves(view, _CONFIG) == (_move(9, 0, 4, 2),)


def test_if_none_makes_room_alone_the_largest_goes():
  view = _view(line(1, 9), next_blocks=20, r7=3, r8=4)

  assert plan_moves(view, _CONFIG) == (_move(8, 0, 4, 1),)


def test_a_request_goes_whole_or_not_at_all():
  # Instance 1 would take 7, not 9; instance 2 holds a part of request 8.
  view = _view(line(1, 7), r7=9)
  assert plan_moves(view, _CONFIG) == ()

  parts = cluster_views.view(
    view.lines, [placement(0, 8, {0: 3, 2: 1}, movable=2)]
  )
  assert plan_moves(parts, _CONFIG) == ()


def test_nobody_goes_where_others_wait_or_memory_is_short_or_no_link_leads():
  waiting = line(1, 9, num_waiting=1, next_blocks=1)
  assert plan_moves(_view(waiting, r7=4), _CONFIG) == ()
  nearly_full = line(1, 9, 100)
  assert plan_moves(_view(nearly_full, r7=4), _CONFIG) == ()
  apart = LinkCosts(domains=(0, 1))
  assert plan_moves(_view(line(1, 9), links=apart, r7=4), _CONFIG) == ()


def test_without_a_shortage_all_stay():
  view = _view(line(1, 9), next_blocks=2, r7=4)

  assert plan_moves(view, _CONFIG) == ()


@hypothesis.given(some_view=cluster_views.views(), data=st.data())
def test_plans_fit_and_do_not_depend_on_the_order(some_view, data):
  plan = plan_moves(some_view, _CONFIG)

  assert plan == plan_moves(cluster_views.shuffled(data, some_view), _CONFIG)
  lendable = {item.instance: item.lendable for item in some_view.lines}
  sizes = {
    item.blocks.uid: dict(item.blocks.holders) for item in some_view.placements
  }
  for move in plan:
    assert sizes[move.uid] == {move.owner: move.num_blocks}
    lendable[move.dst] -= move.num_blocks
  assert min(lendable.values()) >= 0
  owners = [move.owner for move in plan]
  assert len(owners) == len(set(owners))
