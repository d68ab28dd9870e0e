"""No rBlock is lost or made, at whatever moment a request is ended.

`Rig.step` recounts after every step that `used + free + hosted + reserved ==
total` (`tests/recount.py`), `Rig.finish` checks that all is free, and nothing
owed, at the end.
"""

import functools
import heapq

import pytest

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import BlockState
from tests.e2e.rig import LONG, WORKLOAD, right_answers, small_rig

OTHERS = [name for name in WORKLOAD if name != LONG]


@functools.cache
def num_steps(is_slow: bool) -> int:
  """Steps that the workload takes, undisturbed."""
  rig = small_rig()
  steps = []
  run(rig, is_slow, lambda: steps.append(None))
  return len(steps)


def run(rig, is_slow, before_step):
  """Runs the workload; all but `LONG` must end right."""
  transport = rig.engine.group.transport

  def next_step():
    if is_slow:  # What was said in a step is heard in the next one.
      rig.mail.rule = rig.mail.hold
      rig.mail.release(transport)
    before_step()

  rig.expected = right_answers()
  rig.add(WORKLOAD)
  outputs = rig.drain(next_step)
  for name in OTHERS:
    assert outputs[name].token_ids == right_answers()[name]
  rig.finish()
  return outputs


@pytest.mark.parametrize("is_slow", [False, True], ids=["fast", "slow"])
def test_a_request_may_be_aborted_after_any_step(rig, is_slow):
  phases = set()
  for step in range(num_steps(is_slow)):
    countdown = [step]

    def abort(countdown=countdown):
      if countdown[0] == 0:
        request = rig.request(LONG)
        if request is not None:
          manager = rig.engine.group.managers[WORKLOAD[LONG].instance]
          phases.add(manager.phase(request.uid).name)
        rig.engine.abort(LONG)
      countdown[0] -= 1

    outputs = run(rig, is_slow, abort)
    right = right_answers()[LONG]
    answer = outputs[LONG].token_ids
    assert answer == right[: len(answer)]
    assert outputs[LONG].finish_reason in ("abort", "length")
  assert "IDLE" in phases
  if is_slow:  # Each phase of a borrow that waits for a message.
    assert {"ASKING", "RESERVING", "COMMITTING"} <= phases
  assert not rig.failed_rows


@pytest.mark.parametrize("is_slow", [False, True], ids=["fast", "slow"])
def test_all_requests_may_be_aborted_after_any_step(rig, is_slow):
  for step in range(0, num_steps(is_slow), 2):
    rig.expected = right_answers()
    rig.add(WORKLOAD)
    for _ in range(step):
      if is_slow:
        rig.mail.rule = rig.mail.hold
        rig.mail.release(rig.engine.group.transport)
      if rig.engine.has_unfinished():
        rig.step()
    for name in WORKLOAD:
      rig.engine.abort(name)
    rig.drain()
    rig.finish()


def test_a_request_may_be_computed_anew_after_any_step(rig):
  """Preempted by hand at each step, it still ends right."""
  for step in range(0, num_steps(False), 2):
    countdown = [step]

    def preempt(countdown=countdown):
      request = rig.request(LONG)
      if countdown[0] == 0 and request is not None:
        batcher = rig.engine.batchers[WORKLOAD[LONG].instance]
        batcher.preempt(request.uid)
      countdown[0] -= 1

    outputs = run(rig, False, preempt)
    assert outputs[LONG].token_ids == right_answers()[LONG]


LOST = 3
"""An rBlock that the workload uses on every instance."""


def _not_given_back(pool, monkeypatch):
  """A free block that is never handed out again."""
  release = BlockPool._release

  def lose(block):
    release(pool, block)
    if block.block_id == LOST:
      pool._free.remove(LOST)
      heapq.heapify(pool._free)

  monkeypatch.setattr(pool, "_release", lose)
  return lambda: heapq.heappush(pool._free, LOST)


def _given_back_twice(pool, monkeypatch):
  """A block that two may get."""
  release = BlockPool._release

  def double(block):
    release(pool, block)
    if block.block_id == LOST:
      heapq.heappush(pool._free, LOST)

  monkeypatch.setattr(pool, "_release", double)

  def restore():
    pool._free = sorted(set(pool._free))

  return restore


def _kept_for_nobody(pool, monkeypatch):
  """A block that its request, or the debtor, has and the pool does not free."""
  release = BlockPool._release
  kept = []

  def keep(block):
    if block.block_id == LOST and not kept:
      kept.append(block)
    else:
      release(pool, block)

  monkeypatch.setattr(pool, "_release", keep)

  def restore():
    release(pool, kept[0])

  return restore


def _counted_elsewhere(pool, monkeypatch):
  """A block that enters a state and is counted in another one."""
  count = BlockPool._count

  def miscount(block, state):
    if state is BlockState.LIVE:
      state = BlockState.HOSTED
    count(pool, block, state)

  monkeypatch.setattr(pool, "_count", miscount)

  def restore():
    live = [
      block for block in pool._blocks.values() if block.state == BlockState.LIVE
    ]
    pool._num_in[BlockState.HOSTED] -= len(live)
    pool._num_in[BlockState.LIVE] += len(live)

  return restore


@pytest.mark.parametrize(
  "bug",
  [_not_given_back, _given_back_twice, _kept_for_nobody, _counted_elsewhere],
)
def test_the_recount_finds_books_that_only_add_up(rig, monkeypatch, bug):
  pool = rig.engine.group.managers[WORKLOAD[LONG].instance].pool
  rig.add(WORKLOAD)
  with monkeypatch.context() as patch:
    restore = bug(pool, patch)
    with pytest.raises(AssertionError, match=r"rBlock"):
      rig.drain()
    assert pool.counts().is_conserved()
  restore()
  assert rig.clean()
  rig.finish()
