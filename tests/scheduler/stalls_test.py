"""Who makes room when nobody can go on, and when it comes back."""

import pytest

from infinite_llm.scheduler.stalls import StandingAside, who_gives_up


@pytest.mark.parametrize(
  ("running", "waiting", "rounds", "chosen"),
  [
    ((4, 7, 9), (3,), 2, None),
    ((4, 7, 9), (3,), 3, 9),  # The youngest: the oldest always gets through.
    ((4,), (5,), 29, None),
    ((4,), (5,), 30, 4),
    ((), (5, 6), 29, None),
    ((), (5, 6), 30, 5),
    ((), (), 30, None),
  ],
)
def test_the_youngest_makes_room_and_one_that_is_alone_much_later(
  running, waiting, rounds, chosen
):
  assert who_gives_up(running, waiting, rounds) == chosen


def test_one_that_gave_way_comes_back_once_any_that_ran_then_has_ended():
  aside = StandingAside()
  aside.add(9, (4, 7, 9))
  aside.add(7, (4, 7))
  assert aside.awaited == {4, 7}
  assert aside.ended(5) == []  # It waited, or came later.
  assert aside.ended(7) == [9]
  assert aside.awaited == frozenset()
  assert aside.ended(4) == []


def test_all_that_gave_way_to_one_come_back_with_its_end():
  aside = StandingAside()
  aside.add(9, (4, 7, 9))
  aside.add(7, (4, 7))
  assert sorted(aside.ended(4)) == [7, 9]
  assert aside.awaited == frozenset()


def test_it_may_end_itself_and_then_awaits_nobody():
  aside = StandingAside()
  aside.add(9, (4, 9))
  assert aside.ended(9) == []
  assert aside.awaited == frozenset()
  assert aside.ended(4) == []
