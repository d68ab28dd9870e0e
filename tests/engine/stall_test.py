"""Who makes room when nobody can go on."""

import pytest

from infinite_llm.engine.stall import who_gives_up


@pytest.mark.parametrize(
  ("running", "rounds", "chosen"),
  [
    ((4, 7, 9), 2, None),
    ((4, 7, 9), 3, 9),  # The youngest: the oldest always gets through.
    ((4,), 29, None),
    ((4,), 30, 4),
    ((), 29, None),
    ((), 30, 0),  # Whoever waits first.
  ],
)
def test_the_youngest_makes_room_and_one_that_is_alone_much_later(
  running, rounds, chosen
):
  assert who_gives_up(running, rounds) == chosen
