"""rBlocks of a running request go away by plan and come home again."""

from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.messages import GMANAGER, MoveKvcache, RecallKvcache
from tests.e2e.rig import Ask

_NAME = "traveller"
_WORKLOAD = {_NAME: Ask(100, 24, 0)}


class _Plans:
  """As soon as the request is idle: away, home, away to another, and home."""

  def __init__(self, rig):
    self.rig = rig
    self.places = []
    self.plans = [
      lambda uid: MoveKvcache(uid=uid, num_blocks=3, dst=1),
      lambda uid: RecallKvcache(uid=uid, num_blocks=2, src=1, freeze_s=0.001),
      lambda uid: MoveKvcache(uid=uid, num_blocks=3, dst=2),
      lambda uid: RecallKvcache(uid=uid, num_blocks=9, src=1, freeze_s=0.001),
      lambda uid: RecallKvcache(uid=uid, num_blocks=9, src=2, freeze_s=0.001),
    ]

  def __call__(self):
    request = self.rig.request(_NAME)
    manager = self.rig.engine.group.managers[0]
    if request is None or not request.output_token_ids:
      return
    if manager.phase(request.uid) is not Phase.IDLE:
      return
    self.places.append(dict(manager.borrowed()))
    if self.plans:
      self.rig.forge(GMANAGER, 0, self.plans.pop(0)(request.uid))


def test_a_request_goes_on_while_its_blocks_leave_and_come_home(rig):
  rig.add(_WORKLOAD)
  right = rig.drain()[_NAME].token_ids
  rig.finish()
  moved = rig.engine.group.num_blocks_moved
  refuted = rig.engine.group.num_unproved_moves
  plans = _Plans(rig)
  rig.expected = {_NAME: right}
  rig.add(_WORKLOAD)
  answer = rig.drain(plans)[_NAME].token_ids

  assert answer == right
  assert plans.places[:6] == [{}, {1: 3}, {1: 1}, {1: 1, 2: 3}, {2: 3}, {}]
  assert rig.engine.group.num_blocks_moved == moved + 3 + 2 + 3 + 1 + 3
  assert rig.engine.group.num_unproved_moves == refuted
  assert rig.failed_rows == {}
  assert rig.preempted == {}
  rig.finish()
