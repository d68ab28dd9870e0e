"""Which moves an exchange takes, and which go on waiting."""

import pytest

from infinite_llm.config import engine_config
from infinite_llm.engine.waiting_moves import WaitingMoves
from infinite_llm.errors import InvariantError
from tests.testing import move

I, QUOTA = 4, 3


@pytest.fixture(name="moves")
def _moves():
  """Of a process that has instances 2 and 3."""
  config = engine_config(num_instances=I, exchange_blocks=QUOTA)
  return WaitingMoves(config, 2)


def test_shifts_are_distances_around_the_group(moves):
  assert moves.exchange == ()
  moves.add(0, [move(2, 1, 1), move(2, 3, 2)])
  moves.add(1, [move(3, 0, 3)])
  assert moves.exchange == ((1, 1), (3, 1))


@pytest.mark.parametrize(("count", "quota"), [(1, 1), (2, 3), (3, 3), (9, 3)])
def test_a_shift_needs_the_smallest_quota_that_takes_all(moves, count, quota):
  moves.add(0, [move(2, 3, n) for n in range(1, count + 1)])
  moves.add(0, [move(2, 1, 20)])
  assert moves.exchange == ((1, quota), (3, 1))


def test_a_quota_is_of_each_instance_not_of_all(moves):
  moves.add(0, [move(2, 3, 1), move(2, 1, 2)])
  moves.add(1, [move(3, 0, 3), move(3, 2, 4), move(3, 2, 5)])
  assert moves.exchange == ((1, 1), (3, 3))


def test_all_quotas_are_one_if_no_more_may_move():
  config = engine_config(num_instances=I, exchange_blocks=1)
  moves = WaitingMoves(config, 1)
  moves.add(0, [move(0, 3, n) for n in range(1, 6)])
  assert moves.exchange == ((3, 1),)


def test_what_is_over_a_quota_waits_in_order(moves):
  near = [move(2, 3, n) for n in range(1, 7)]
  far = move(2, 1, 7)
  moves.add(0, [*near, far])
  moves.add(1, [move(3, 0, 8)])

  assert moves.next(0, 3, QUOTA) == (far,)
  assert moves.next(1, 1, QUOTA) == (move(3, 0, 8),)
  # One of them is agreed on before all know of the others.
  for quota, taken in ((1, near[:1]), (QUOTA, near[1:4]), (QUOTA, near[4:])):
    assert moves.exchange == ((1, QUOTA), (3, 1))
    assert moves.next(0, 1, quota) == tuple(taken)
    moves.drop(0, taken)
  assert moves.next(0, 1, QUOTA) == ()
  assert moves.exchange == ((1, 1), (3, 1))  # Nobody dropped the others.


def test_what_is_not_dropped_is_next_again(moves):
  moves.add(0, [move(2, 3, 1), move(2, 0, 2), move(2, 3, 3)])
  both = (move(2, 3, 1), move(2, 3, 3))
  assert moves.next(0, 1, QUOTA) == moves.next(0, 1, QUOTA) == both
  assert moves.exchange == ((1, QUOTA), (2, 1))
  moves.drop(0, [move(2, 3, 1)])
  assert moves.next(0, 1, QUOTA) == (move(2, 3, 3),)
  assert moves.exchange == ((1, 1), (2, 1))


def test_a_move_to_its_own_instance_is_refused_and_nothing_is_queued(moves):
  with pytest.raises(InvariantError, match="to another instance; got Move"):
    moves.add(0, [move(2, 3, 1), move(2, 2, 2)])
  assert moves.exchange == ()
