import hypothesis
from hypothesis import strategies as st

from infinite_llm.scheduler.allotment import allot
from tests.scheduler import cluster_views
from tests.scheduler.cluster_views import line


def _waits(instance, free, needed, arrival, capacity=10, **fields):
  """An instance on which a request waits for `needed` rBlocks."""
  fields = {"local_blocks": capacity - free} | fields
  return line(
    instance,
    free,
    capacity,
    num_waiting=1,
    next_blocks=needed,
    next_arrival=arrival,
    **fields,
  )


def test_a_request_larger_than_a_pool_may_count_on_all_others():
  # Needs 20: 10 at home and 10 of the 6 + 4 elsewhere.
  lines = [_waits(0, 10, 20, 7), line(1, 6), line(2, 4)]

  assert allot(lines) == {0: 7}
  assert allot([_waits(0, 10, 21, 7), *lines[1:]]) == {}


def test_a_request_that_its_own_pool_can_hold_waits_for_it():
  lines = [_waits(0, 2, 10, 7), line(1, 10)]

  assert allot(lines) == {}


def test_what_long_requests_hold_is_no_room_to_wait_for():
  # Of 10 rBlocks 2 are free, 5 of short requests, 3 lent or of a long one.
  lines = [_waits(0, 2, 8, 7, local_blocks=5), line(1, 10)]

  assert allot(lines) == {0: 7}
  assert allot([_waits(0, 2, 7, 7, local_blocks=5), line(1, 10)]) == {}


def test_one_room_is_allotted_once_and_to_who_came_first():
  # 24 free rBlocks: two requests of 16 each would come in by half.
  lines = [
    _waits(0, 8, 16, arrival=9),
    _waits(1, 8, 16, arrival=4),
    line(2, 8),
  ]

  assert allot(lines) == {1: 4}
  assert allot([*lines, line(3, 8)]) == {0: 9, 1: 4}


def test_nobody_overtakes_a_longer_request_that_came_first():
  lines = [
    _waits(0, 10, 90, arrival=1),
    _waits(1, 10, 12, arrival=2),
    line(2, 10),
  ]

  assert allot(lines) == {}


def test_what_running_requests_are_still_to_get_comes_first():
  # Instance 2 has 3 free rBlocks and promised 9: it is to borrow 6 of the 10.
  lines = [
    _waits(0, 10, 15, arrival=1),
    line(1, 10),
    line(2, 3, lendable=0, promised=9),
  ]

  assert allot(lines) == {}
  assert allot([_waits(0, 10, 14, arrival=1), *lines[1:]]) == {0: 1}


def test_rblocks_that_are_promised_at_home_are_no_room():
  # 10 free, 4 of them for its running requests: the next one lacks 8 of 14.
  lines = [_waits(0, 10, 14, 1, promised=4, lendable=6), line(1, 7)]

  assert allot(lines) == {}
  assert allot([lines[0], line(1, 8)]) == {0: 1}


@hypothesis.given(data=st.data(), view=cluster_views.views())
@hypothesis.settings(max_examples=200)
def test_all_that_come_in_find_room(data, view):
  lines = list(view.lines)
  arrivals = data.draw(st.permutations(range(1, len(lines) + 1)))
  lines = [
    line(
      old.instance,
      old.free,
      old.capacity,
      lendable=min(old.lendable, old.free),
      next_blocks=old.next_blocks,
      next_arrival=arrival if old.next_blocks else 0,
      num_waiting=old.num_waiting,
      debts=old.debts,
    )
    for old, arrival in zip(lines, arrivals, strict=True)
  ]

  allotted = allot(lines)

  assert allotted == allot(data.draw(st.permutations(lines)))
  coming = [item for item in lines if item.instance in allotted]
  assert all(allotted[item.instance] == item.next_arrival for item in coming)
  rest = [item for item in lines if item.instance not in allotted]
  assert sum(item.next_blocks for item in coming) <= (
    sum(item.free for item in coming) + sum(item.lendable for item in rest)
  )
