"""rBlocks that move all the time change no token, whichever way they go."""

import collections

import pytest

from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.messages import (
  GMANAGER,
  MoveKvcache,
  RecallKvcache,
)
from tests.e2e.rig import WORKLOAD, right_answers


class Mover:
  """Plans of a gManager that is never content.

  Whenever nothing is under way with a request, it has rBlocks of it go to an
  instance that has none of them, or come home.

  Attributes:
    plans: How many were sent, by kind and by whether the request decoded.
  """

  def __init__(self, rig, names):
    self._rig = rig
    self._names = names
    self._turn = 0
    self.plans = collections.Counter()

  def __call__(self):
    group = self._rig.engine.group
    for name in self._names:
      request = self._rig.request(name)
      home = WORKLOAD[name].instance
      if request is None or not request.num_computed_tokens:
        continue
      manager = group.managers[home]
      if manager.phase(request.uid) is not Phase.IDLE:
        continue
      is_decoding = request.num_uncomputed == 1
      lent = [where.instance for _, where in self._rig.lent(name)]
      self._turn += 1
      if lent and self._turn % 2:
        plan = RecallKvcache(
          uid=request.uid,
          num_blocks=1 + self._turn % 3,
          src=lent[self._turn % len(lent)],
          freeze_s=1e-9,
        )
      else:
        others = [n for n in range(4) if n != home]
        plan = MoveKvcache(
          uid=request.uid,
          num_blocks=1 + self._turn % 2,
          dst=others[self._turn % len(others)],
        )
      self.plans[type(plan).__name__, is_decoding] += 1
      self._rig.forge(GMANAGER, home, plan)


@pytest.mark.parametrize("names", [("long",), ("short-2", "short-3"), WORKLOAD])
def test_moves_in_both_directions_at_every_step(rig, names):
  rig.expected = right_answers()
  mover = Mover(rig, names)
  num_moved = rig.engine.group.num_blocks_moved
  rig.add(WORKLOAD)
  outputs = rig.drain(mover)
  assert {name: outputs[name].token_ids for name in WORKLOAD} == rig.expected
  assert rig.engine.group.num_blocks_moved - num_moved >= 4
  # Both kinds, and the long ones while they prefill and while they decode.
  assert {kind for kind, _ in mover.plans} == {"MoveKvcache", "RecallKvcache"}
  if "long" in names:
    assert {is_decoding for _, is_decoding in mover.plans} == {False, True}
  assert not rig.failed_rows
  rig.finish()
