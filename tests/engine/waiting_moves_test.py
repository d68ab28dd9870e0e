"""Which moves an exchange takes, and which go on waiting."""

import pytest

from infinite_llm.config import engine_config
from infinite_llm.engine.waiting_moves import WaitingMoves
from infinite_llm.errors import InvariantError
from tests.testing import move

I, QUOTA = 4, 2


@pytest.fixture(name="moves")
def _moves():
  """Of a process that has instances 2 and 3."""
  config = engine_config(num_instances=I, exchange_blocks=QUOTA)
  return WaitingMoves(config, 2)


def test_shifts_are_distances_around_the_group(moves):
  assert moves.shifts == ()
  moves.add(0, [move(2, 1, 1), move(2, 3, 2)])
  moves.add(1, [move(3, 0, 3)])
  assert moves.shifts == (1, 3)


def test_what_is_over_a_quota_waits_in_order(moves):
  near = [move(2, 3, n) for n in range(1, 6)]
  far = move(2, 1, 6)
  moves.add(0, [*near, far])
  moves.add(1, [move(3, 0, 7)])

  assert moves.next(0, 3) == (far,)
  assert moves.next(1, 1) == (move(3, 0, 7),)
  for taken in (near[:2], near[2:4], near[4:]):
    assert moves.next(0, 1) == tuple(taken)
    moves.drop(0, taken)
  assert moves.next(0, 1) == ()
  assert moves.shifts == (1, 3)  # Nobody dropped the others.


def test_what_is_not_dropped_is_next_again(moves):
  moves.add(0, [move(2, 3, 1), move(2, 0, 2), move(2, 3, 3)])
  assert moves.next(0, 1) == moves.next(0, 1) == (move(2, 3, 1), move(2, 3, 3))
  moves.drop(0, [move(2, 3, 1)])
  assert moves.next(0, 1) == (move(2, 3, 3),)
  assert moves.shifts == (1, 2)


def test_a_move_to_its_own_instance_is_refused_and_nothing_is_queued(moves):
  with pytest.raises(InvariantError, match="to another instance; got Move"):
    moves.add(0, [move(2, 3, 1), move(2, 2, 2)])
  assert moves.shifts == ()
