"""Who makes room when nobody can go on."""

import pytest

from infinite_llm.engine.stall import who_gives_up


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
