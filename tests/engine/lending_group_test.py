import time
import types

import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.step_header import (
  GroupWork,
  OwnOrder,
  StepHeader,
)
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.effects import MoveBlocks
from tests.testing import move


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"policy": "swap"}, "host_blocks must be at least 2 for policy 'swap'"),
    (
      {"policy": "migrate"},
      "one of borrow, greedy, static, swap in an engine; got 'migrate'",
    ),
    ({"policy": "greedy"}, "performance_profile.* must be a model"),
    (
      {"policy": "greedy", "performance_profile": "none.json"},
      "path must name a performance profile; got 'none.json'",
    ),
  ],
)
def test_options_that_it_cannot_carry_out_are_refused(options, text):
  config = engine_config(num_instances=2, num_blocks=9, **options)

  # It is refused before the devices are touched.
  with pytest.raises(ConfigError, match=text):
    LendingGroup(
      config, None, time.monotonic, InProcessTransport(), OwnOrder(1024)
    )


class Runner:
  """Devices of a process that has instances 0 and 1 of four.

  Attributes:
    launched: For each exchange its shift, its quota, and what instances 0 and 1
      send.
  """

  instances = range(2)

  def __init__(self):
    self.launched = []

  def exchange(self, shift, payloads):
    numbers = [sent.src_block[sent.dst_block != 0] for sent in payloads]
    (quota,) = {len(sent.src_block) for sent in payloads}
    self.launched.append((shift, quota, *(each.tolist() for each in numbers)))
    return []


class TestSharedTurns:
  @pytest.fixture(name="runner")
  def _runner(self):
    return Runner()

  @pytest.fixture(name="group")
  def _group(self, runner, monkeypatch):
    """One in which instance 0 wants to move rBlocks 1 to 4, and 1 nothing."""
    config = engine_config(num_instances=4, num_blocks=9, exchange_blocks=2)
    order = types.SimpleNamespace(is_shared=True, next_number=1)
    transport = InProcessTransport()
    for instance in (2, 3):
      transport.register(instance, lambda _: None)
    group = LendingGroup(config, runner, time.monotonic, transport, order)
    moves = (move(0, 1, 1), move(0, 3, 2), move(0, 1, 3), move(0, 1, 4))
    first, _ = group.managers
    effects = [[MoveBlocks(moves=moves)]]
    monkeypatch.setattr(
      first, "drain_effects", lambda: effects.pop() if effects else ()
    )
    self.exchanged = []
    monkeypatch.setattr(first, "on_exchanged", self.exchanged.extend)
    group.talk(lambda _: False)
    return group

  def take(self, group, number, *exchange):
    """Takes a turn; returns which rBlocks were said to be sent."""
    work = GroupWork(exchange=exchange)
    turn = StepHeader(number=number, work=work, is_shared=True)
    self.exchanged.clear()
    assert group.move(turn, lambda uid: 0) == bool(exchange)
    return [move.src_block for move in self.exchanged]

  def test_it_asks_for_the_exchanges_of_its_moves(self, group):
    assert group.work() == GroupWork(exchange=((1, 2), (3, 1)))

  def test_moves_by_a_shift_that_was_not_agreed_wait_in_order(
    self, group, runner
  ):
    assert self.take(group, 1, (2, 2), (3, 2)) == [2]
    assert runner.launched == [(2, 2, [], []), (3, 2, [2], [])]
    assert group.work() == GroupWork(exchange=((1, 2),))

    assert self.take(group, 2, (1, 2), (2, 1)) == [1, 3]
    assert runner.launched[2:] == [(1, 2, [1, 3], []), (2, 1, [], [])]
    assert group.work() == GroupWork(exchange=((1, 1),))
    assert self.take(group, 3, (1, 1)) == [4]
    assert runner.launched[4:] == [(1, 1, [4], [])]
    assert not group.work()
    assert group.num_blocks_moved == 4

  def test_the_oldest_moves_take_a_smaller_quota_than_they_need(
    self, group, runner
  ):
    assert self.take(group, 1, (1, 1)) == [1]
    assert runner.launched == [(1, 1, [1], [])]
    assert group.work() == GroupWork(exchange=((1, 2), (3, 1)))
    assert self.take(group, 2, (1, 1), (3, 1)) == [3, 2]
    assert self.take(group, 3, (1, 2)) == [4]
    assert not group.work()

  def test_nothing_runs_in_a_turn_without_an_exchange(self, group, runner):
    assert self.take(group, 1) == []
    assert runner.launched == []
    assert group.work() == GroupWork(exchange=((1, 2), (3, 1)))

  def test_all_agreed_exchanges_run_with_nothing_to_move(self, group, runner):
    self.take(group, 1, (1, 2), (3, 1))
    self.take(group, 2, (1, 1))
    runner.launched.clear()
    assert self.take(group, 3, (1, 2), (2, 1), (3, 1)) == []
    assert runner.launched == [
      (n, q, [], []) for n, q in ((1, 2), (2, 1), (3, 1))
    ]
