"""No rBlock is lost or made, at whatever moment a request is ended.

`Rig.step` checks `used + free + hosted + reserved == total` after every step,
`Rig.finish` that all is free, and nothing owed, at the end.
"""

import functools

import pytest

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
