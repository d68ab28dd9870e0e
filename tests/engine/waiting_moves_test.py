"""Which moves an exchange takes, and which go on waiting."""

import pytest

from infinite_llm.config import engine_config
from infinite_llm.engine.waiting_moves import WaitingMoves
from infinite_llm.scheduler.effects import Move

I, QUOTA = 4, 2


def move(src: int, dst: int, number: int) -> Move:
  """Sends the rBlock `number` of one instance to another."""
  return Move(
    uid=7,
    logical_id=number,
    src_instance=src,
    src_block=number,
    src_tag=100 + number,
    dst_instance=dst,
    dst_block=50 + number,
    dst_epoch=200 + number,
    dst_tag=300 + number,
  )


@pytest.fixture(name="moves")
def _moves():
  """Of a process that has instances 2 and 3."""
  config = engine_config(num_instances=I, exchange_blocks=QUOTA)
  return WaitingMoves(config, 2)


def carried(payloads):
  """rBlocks that are sent, by shift."""
  return {
    shift: sent.src_block[sent.dst_block != 0].tolist()
    for shift, sent in payloads.items()
  }


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

  payloads, sent = moves.take(moves.shifts, [True, True])

  assert [carried(mine) for mine in payloads] == [
    {1: [1, 2], 3: [6]},
    {1: [7], 3: []},
  ]
  assert sent == [(*near[:2], far), (move(3, 0, 7),)]
  assert moves.shifts == (1,)
  for numbers in ([3, 4], [5]):
    payloads, _ = moves.take(moves.shifts, [True, True])
    assert carried(payloads[0]) == {1: numbers}
  assert moves.shifts == ()


def test_moves_by_other_shifts_than_agreed_wait_in_order(moves):
  near = [move(2, 3, n) for n in (1, 2, 3)]
  moves.add(0, [near[0], move(2, 0, 4), *near[1:]])

  payloads, sent = moves.take((2, 3), [True, True])

  assert carried(payloads[0]) == {2: [4], 3: []}
  assert sent == [(move(2, 0, 4),), ()]
  assert moves.shifts == (1,)
  payloads, sent = moves.take((1,), [True, True])
  assert carried(payloads[0]) == {1: [1, 2]}
  assert sent[0] == tuple(near[:2])


def test_an_instance_that_does_not_join_sends_nothing(moves):
  moves.add(0, [move(2, 3, 1)])
  moves.add(1, [move(3, 0, 2)])

  payloads, sent = moves.take((1,), [False, True])

  assert [carried(mine) for mine in payloads] == [{1: []}, {1: [2]}]
  assert sent == [(), (move(3, 0, 2),)]
  assert moves.shifts == (1,)
