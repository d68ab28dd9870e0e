"""Which rBlocks of a request larger than all HBM lie in HOST, and when.

An instance has 8 rBlocks of 8 tokens in HBM and 12 in HOST. A request of more
than 64 tokens keeps 4 in HBM, and two of them go to HOST together.
"""

import dataclasses

import pytest

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.content_tag import content_tag
from infinite_llm.cache.rblock import BlockState
from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Phase, Reconcile, SpillInfo
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.effects import DropOverflow, OverflowBlocks, Swap
from infinite_llm.scheduler.overflow import OverflowRule
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import NOTHING, Ceiling, Row, StepPlan
from infinite_llm.scheduler.swapping import HostTier
from infinite_llm.types import PoolCounts, Tier
from tests.recount import check_books
from tests.scheduler.fake_cluster import BLOCK_SIZE, SWAP_COSTS
from tests.scheduler.fake_engine import make_request

UID = 7
_LENDING = LendingConfig(policy="swap")
_SCHEDULER = SchedulerConfig(
  max_num_seqs=3,
  decode_buckets=(3,),
  prefill_buckets=(32,),
  prefill_rows=2,
)
_RULE = OverflowRule(reachable_blocks=8, kept_blocks=4, slab_blocks=2)


def _manager(host_blocks=13, rule=_RULE):
  return RManager(
    instance=0,
    num_instances=1,
    pool=BlockPool(0, 9),
    block_size=BLOCK_SIZE,
    lending=_LENDING,
    clock=lambda: 0.0,
    host=HostTier(
      pool=BlockPool(0, host_blocks, tier=Tier.HOST),
      costs=SWAP_COSTS,
      overflow=rule,
    ),
  )


def _entered(**options):
  """A manager with UID, which has 4 rBlocks and 3 proved ones."""
  manager = _manager(**options)
  manager.open(UID)
  assert manager.overflow.enter(UID)
  assert manager.allocate(UID, 4)
  manager.confirm(UID, 3 * BLOCK_SIZE + 4)
  return manager


def _counts(total, **counts):
  zeros = {"used": 0, "free": 0, "hosted": 0, "reserved": 0}
  return PoolCounts(**zeros | counts, total=total)


def _tag(logical_id, epoch):
  return content_tag(
    uid=UID, logical_id=logical_id, epoch=epoch, filled=BLOCK_SIZE
  )


def _copy(manager):
  """What is to be copied now; nothing else is to be done."""
  (effect,) = manager.drain_effects()
  assert isinstance(effect, OverflowBlocks)
  return effect


def test_its_oldest_rblocks_go_to_host_and_the_table_names_them_there():
  manager = _entered()
  assert manager.overflow.begin()
  effect = _copy(manager)
  assert effect == OverflowBlocks(
    uid=UID,
    swaps=tuple(
      Swap(
        uid=UID,
        logical_id=n,
        src_block=n + 1,
        src_tag=_tag(n, n + 1),
        dst_block=n + 1,
        dst_tag=_tag(n, n + 1),
      )
      for n in range(2)
    ),
  )
  table = manager.table(UID)
  assert (manager.phase(UID), table.num_host) == (Phase.OVERFLOWING, 0)
  assert manager.is_readable(UID)  # They are in HBM still.
  assert manager.pool.block(1).state is BlockState.MOVING
  assert manager.counts() == _counts(8, used=4, free=4)
  assert manager.counts(Tier.HOST) == _counts(12, reserved=2, free=10)

  manager.overflow.on_copied(effect)

  assert (manager.phase(UID), table.num_host) == (Phase.IDLE, 2)
  assert table.local_entries().logical_ids.tolist() == [2, 3]
  assert [table.location(n).tier for n in range(3)] == [
    Tier.HOST,
    Tier.HOST,
    Tier.HBM,
  ]
  assert table.num_blocks == 4
  assert manager.counts() == _counts(8, used=2, free=6)
  assert manager.counts(Tier.HOST) == _counts(12, used=2, free=10)


def test_what_became_due_while_a_slab_left_is_done_then():
  manager = _entered()
  manager.overflow.begin()
  account = manager._debtor.account(UID)
  account.must_sync = True  # As when a creditor was silent for too long.
  manager.overflow.on_copied(_copy(manager))
  assert not account.must_sync
  assert manager.is_readable(UID)


def test_the_next_slab_begins_where_the_last_one_ended():
  manager = _entered()
  manager.overflow.begin()
  manager.overflow.on_copied(_copy(manager))
  assert not manager.overflow.begin()  # One more is proved; a slab is two.
  manager.confirm(UID, 4 * BLOCK_SIZE)
  assert manager.overflow.begin()
  assert [swap.logical_id for swap in _copy(manager).swaps] == [2, 3]


def test_it_keeps_its_part_of_hbm_and_no_more():
  manager = _entered()
  assert manager.overflow.room(UID, 3) == 0
  assert not manager.allocate(UID, 1)
  manager.overflow.begin()
  manager.overflow.on_copied(_copy(manager))
  assert manager.overflow.room(UID, 3) == 2
  assert not manager.allocate(UID, 3)
  assert manager.allocate(UID, 2)
  manager.open(8)
  assert manager.overflow.room(8, 4) == 4
  assert manager.allocate(8, 4)


def test_one_copy_is_under_way_at_a_time():
  manager = _entered()
  manager.confirm(UID, 4 * BLOCK_SIZE)
  assert manager.overflow.begin()
  assert manager.overflow.begin()
  assert len(manager.drain_effects()) == 1


def test_where_host_is_full_nothing_leaves():
  manager = _entered(host_blocks=2)
  assert manager.overflow.lacks_host
  assert not manager.overflow.begin()
  assert manager.phase(UID) is Phase.IDLE
  assert manager.drain_effects() == []


def test_it_is_not_swapped_out_nor_moved_while_a_copy_is_under_way():
  manager = _entered()
  assert not manager.swapping.swap_out(UID)
  assert manager.movable_blocks(UID) == 3
  manager.overflow.begin()
  assert manager.movable_blocks(UID) == 0
  assert not manager.borrow(UID, 2)
  assert manager.resident_blocks(UID) == 0  # Its steps are not plain ones.


def test_a_step_that_fails_has_all_of_it_computed_again():
  assert _entered().reconcile(UID) is Reconcile.RECOMPUTE


def test_a_request_that_ends_leaves_both_tiers_empty():
  manager = _entered()
  manager.overflow.begin()
  manager.overflow.on_copied(_copy(manager))
  manager.close(UID)
  assert manager.drain_effects() == [DropOverflow(uid=UID)]
  assert manager.counts() == _counts(8, free=8)
  assert manager.counts(Tier.HOST) == _counts(12, free=12)
  assert manager.overflow.uid is None


def test_while_a_copy_is_under_way_neither_end_is_free():
  manager = _entered()
  manager.overflow.begin()
  effect = _copy(manager)
  manager.close(UID)
  assert manager.counts() == _counts(8, used=2, free=6)
  assert manager.counts(Tier.HOST) == _counts(12, reserved=2, free=10)
  manager.open(UID)  # The same request anew, before the old copy is there.
  assert manager.overflow.enter(UID)
  assert manager.allocate(UID, 1)

  manager.overflow.on_copied(effect)

  assert manager.table(UID).num_host == 0
  assert manager.counts() == _counts(8, reserved=1, free=7)
  assert manager.counts(Tier.HOST) == _counts(12, free=12)
  with pytest.raises(InvariantError, match="No slab like this is on its way"):
    manager.overflow.on_copied(effect)


def test_there_is_one_such_request_at_a_time():
  manager = _entered()
  manager.open(8)
  assert not manager.overflow.enter(8)
  assert manager.overflow.enter(UID)
  assert not manager.overflow.may_enter(65)
  assert manager.overflow.may_enter(64)
  manager.close(UID)
  assert manager.overflow.enter(8)


def test_who_is_larger_than_all_hbm_needs_a_part_of_it():
  overflow = _manager().overflow
  assert [overflow.is_beyond(n) for n in (64, 65)] == [False, True]
  assert [overflow.needed_blocks(n) for n in (64, 65)] == [8, 4]
  assert overflow.chunk_tokens(32) == 16


def test_without_a_rule_nobody_overflows():
  overflow = _manager(rule=None).overflow
  assert (overflow.most_blocks, _manager().overflow.most_blocks) == (0, 12)
  assert not overflow.is_beyond(10**9)
  assert overflow.needed_blocks(80) == 10
  assert overflow.chunk_tokens(32) == 32
  assert not overflow.lacks_host
  assert not overflow.begin()


class _Plans:
  """A batcher whose steps are all proved, and copies done before the next."""

  def __init__(self, **options):
    self.manager = _manager(**options)
    self.batcher = Batcher(self.manager, _SCHEDULER, _LENDING, BLOCK_SIZE)
    self.requests = {}

  def add(self, uid, num_tokens, max_tokens=4):
    request = make_request(uid, num_tokens, max_tokens=max_tokens)
    self.requests[uid] = request
    self.batcher.add(request)
    return request

  def step(self) -> StepPlan:
    for effect in self.manager.drain_effects():
      if isinstance(effect, OverflowBlocks):
        self.manager.overflow.on_copied(effect)
      elif not isinstance(effect, DropOverflow):
        self.manager.swapping.on_swapped(effect)
    plan = self.batcher.plan()
    for row in plan.rows:
      self.batcher.advance(row)
      request = self.requests[row.uid]
      if row.samples:
        request.output_token_ids.append(1)
        if request.num_tokens == request.max_total_tokens:
          self.batcher.finish(row.uid, RequestStatus.FINISHED_LENGTH)
    check_books(self.manager, [r.uid for r in self.batcher.running])
    return plan

  def steps(self) -> list[StepPlan]:
    """All steps until nobody is left."""
    plans = []
    while self.batcher.has_work:
      plans.append(self.step())
      assert len(plans) < 500
    self.manager.drain_effects()
    for tier in Tier:
      counts = self.manager.counts(tier)
      assert counts.free == counts.total, tier
    return plans


def _row(uid, start, num_tokens, samples=False):
  return Row(uid=uid, start=start, num_tokens=num_tokens, samples=samples)


def test_a_long_prompt_is_computed_a_slab_at_a_time_once_it_overflows():
  plans = _Plans()
  plans.add(1, 90, max_tokens=2)
  made = [plan for plan in plans.steps() if plan.rows]
  assert made == [
    StepPlan(local_prefill=(_row(1, 0, 32),)),
    *(StepPlan(layered=(_row(1, start, 16),)) for start in (32, 48, 64)),
    StepPlan(layered=(_row(1, 80, 10, samples=True),)),
    StepPlan(layered=(_row(1, 90, 1, samples=True),)),
  ]


def test_others_go_on_beside_it():
  plans = _Plans()
  plans.add(1, 90)
  plans.add(2, 10, max_tokens=6)
  both = [p for p in plans.steps() if p.layered and p.local_decode]
  assert len(both) >= 3


def test_who_waits_for_its_place_is_overtaken_by_those_who_do_not():
  plans = _Plans()
  plans.add(1, 90)
  second = plans.add(2, 80)
  third = plans.add(3, 10)
  plans.step()
  assert second.status is RequestStatus.WAITING
  assert third.status is RequestStatus.RUNNING
  plans.steps()
  assert second.num_tokens == 84


def test_it_makes_room_for_elder_ones_and_is_not_preempted():
  """Its 4 rBlocks and the 5 of the other one are more than there are."""
  plans = _Plans()
  elder = plans.add(1, 8, max_tokens=30)
  long = plans.add(2, 80, max_tokens=30)

  def preempt(uid):
    raise AssertionError(f"request {uid} is preempted")

  plans.batcher.preempt = preempt
  plans.steps()
  assert [elder.num_tokens, long.num_tokens] == [38, 110]


def test_one_that_decodes_beyond_hbm_goes_on_where_it_is():
  plans = _Plans()
  plans.add(1, 60, max_tokens=40)
  rows = [row for plan in plans.steps() for row in plan.rows]
  assert [row.start for row in rows[1:]] == [row.end for row in rows[:-1]]
  assert rows[-1].end == 99


def test_what_waits_in_host_is_dropped_where_it_needs_the_room():
  plans = _Plans(host_blocks=9)
  manager = plans.manager
  plans.add(1, 40, max_tokens=24)
  plans.add(2, 23, max_tokens=30)
  while manager.swapping.stage(2) is None:
    plans.step()
  plans.step()
  long = plans.add(3, 90)
  plans.batcher._waiting.rotate(1)  # As if it had come before 2.
  plans.steps()
  assert long.num_tokens == 94
  assert plans.requests[2].num_tokens == 53


def test_nobody_is_preempted_where_only_its_share_is_too_small():
  """HOST is full and nobody lends: it waits, and those after it go on."""
  plans = _Plans(host_blocks=5)
  plans.add(1, 80)
  short = plans.add(2, 10, max_tokens=6)

  def preempt(uid):
    raise AssertionError(f"request {uid} is preempted")

  plans.batcher.preempt = preempt
  for _ in range(30):
    plans.step()
  assert short.status is RequestStatus.FINISHED_LENGTH
  assert plans.manager.table(1).num_host == 4


def test_what_neither_its_share_nor_host_takes_is_to_be_had_elsewhere():
  overflow = _manager(host_blocks=6).overflow  # Two slabs; one is no slab.
  assert [overflow.needed_blocks(8 * n) for n in (8, 9, 12)] == [8, 5, 8]


def test_room_is_made_before_a_turn_is_asked_for():
  """Else all processes would take turns in which there is nothing to do."""
  plans = _Plans()
  plans.add(1, 90)
  manager = plans.manager
  while manager.table(1).num_host == 0 if plans.batcher.running else True:
    plans.step()
  slot = SpillInfo(slot=0, slot_epoch=1, versions={1: 1})
  manager.spill = lambda uid: slot
  turns, asked = 0, []
  while manager.table(1).num_host < 6:
    for effect in manager.drain_effects():
      manager.overflow.on_copied(effect)
    rows = plans.batcher.group_work({})
    asked.append(rows.layered_tokens)
    group = dataclasses.replace(NOTHING, layered_tokens=rows.layered_tokens)
    plan = plans.batcher.plan(Ceiling(group=group, long=False))
    assert len(plan.group_layered) == bool(rows.layered_tokens)
    for row in plan.rows:
      turns += 1
      plans.batcher.advance(row)
  assert turns >= 2
  assert 0 in asked
