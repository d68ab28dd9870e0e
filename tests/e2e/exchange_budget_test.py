"""rBlocks move a few at a time, between steps in which others go on."""

import collections
import itertools
from typing import NamedTuple

import numpy as np

from infinite_llm.scheduler.account import Phase
from tests.e2e.rig import LONG, WORKLOAD, Ask, right_answers

OWNER = WORKLOAD[LONG].instance
BESIDE = Ask(20, 40, OWNER)


class Moment(NamedTuple):
  """What is so before a step.

  Attributes:
    launches: Programs launched so far, by kind.
    num_moved: rBlocks sent so far.
    is_moving: Whether payloads of `LONG` wait for the exchange.
    num_computed: Computed tokens of the request beside it; None if it does not
      run.
    has_room: Whether that one's next token goes into an rBlock that it has.
  """

  launches: collections.Counter[str]
  num_moved: int
  is_moving: bool
  num_computed: int | None
  has_room: bool


def moment(rig) -> Moment:
  manager = rig.engine.group.managers[OWNER]
  long, beside = rig.request(LONG), rig.request("beside")
  size = rig.engine.config.cache.block_size
  return Moment(
    launches=rig.engine.runner.launches.copy(),
    num_moved=rig.engine.group.num_blocks_moved,
    is_moving=long is not None and manager.phase(long.uid) is Phase.MOVING,
    num_computed=beside and beside.num_computed_tokens,
    has_room=beside is not None
    and beside.num_uncomputed == 1
    and beside.num_tokens <= manager.table(beside.uid).num_blocks * size,
  )


def test_a_step_moves_its_quota_and_rows_beside_go_on(rig):
  moments = []
  quota = rig.engine.config.lending.exchange_blocks
  num_shifts = rig.engine.config.num_instances - 1
  rig.expected = right_answers()
  num_moved = rig.engine.group.num_blocks_moved
  rig.add({LONG: WORKLOAD[LONG], "beside": BESIDE})
  rig.drain(lambda: moments.append(moment(rig)))
  rig.finish()

  num_steps_moving = 0
  for before, after in itertools.pairwise(moments):
    launched = after.launches - before.launches
    # A program for each shift; only `OWNER` has anything to move.
    assert launched["exchange"] <= num_shifts
    assert after.num_moved - before.num_moved <= quota * launched["exchange"]
    assert launched["verify"] <= 1
    if before.is_moving:
      assert launched["exchange"] > 0  # What waits is moved at once.
      if before.has_room and after.num_computed is not None:
        assert after.num_computed == before.num_computed + 1
        num_steps_moving += 1
  assert num_steps_moving > 0

  launched = moments[-1].launches - moments[0].launches
  num_moved = rig.engine.group.num_blocks_moved - num_moved
  # Whole quotas, but for the last ones of each grant.
  assert launched["exchange"] <= num_moved // quota + rig.mail.sent["Reserve"]
  assert not rig.failed_rows


def test_an_exchange_is_as_large_as_what_waits_for_it(rig, monkeypatch):
  """One rBlock has a small program; all tokens are checked."""
  launched = collections.Counter()
  exchange = rig.engine.runner.exchange

  def note(shift, payloads):
    most = max(np.count_nonzero(sent.dst_block) for sent in payloads)
    (quota,) = {len(sent.dst_block) for sent in payloads}
    launched[most, quota] += 1
    return exchange(shift, payloads)

  monkeypatch.setattr(rig.engine.runner, "exchange", note)
  rig.expected = right_answers()
  rig.add(WORKLOAD)
  outputs = rig.drain()
  rig.finish()

  assert {name: out.token_ids for name, out in outputs.items()} == rig.expected
  quota = rig.engine.config.lending.exchange_blocks
  assert set(launched) == {(1, 1), (quota, quota)}
  assert not rig.failed_rows


def test_moves_go_on_when_nothing_else_runs(rig):
  """Each step moves a quota until the request has room for its next chunk."""
  moments = []
  rig.expected = right_answers()
  rig.add({LONG: WORKLOAD[LONG]})
  rig.drain(lambda: moments.append(moment(rig)))
  rig.finish()

  for before, after in itertools.pairwise(moments):
    launched = after.launches - before.launches
    if before.is_moving:
      assert launched["exchange"] > 0
  assert any(before.is_moving for before in moments)
  assert len(moments) <= 40
