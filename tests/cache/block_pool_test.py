import collections

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import BlockState, Location
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.types import PoolCounts, Tier


def test_the_lowest_free_blocks_are_taken_under_new_epochs():
  pool = BlockPool(3, 6)

  assert pool.allocate(2, uid=7) == (
    Location(instance=3, block_id=1, epoch=1),
    Location(instance=3, block_id=2, epoch=2),
  )
  pool.free(1, uid=7)
  assert pool.allocate(2, uid=8) == (
    Location(instance=3, block_id=1, epoch=3),
    Location(instance=3, block_id=3, epoch=4),
  )


def test_shortage_is_a_value_and_changes_nothing():
  pool = BlockPool(0, 4)
  pool.allocate(2, uid=7)

  assert pool.allocate(2, uid=8) is None
  assert pool.reserve_for(owner=1, uid=9, count=2) is None
  assert pool.num_free == 1
  assert pool.num_lent == 0


def test_every_state_is_counted_once():
  pool = BlockPool(0, 11)
  pool.allocate(4, uid=7)  # 1, 2, 3, 4
  for block_id in (1, 2, 3):
    pool.mark_live(block_id)
  pool.begin_move(2)
  pool.reserve_for(owner=1, uid=9, count=3)  # 5, 6, 7
  pool.commit_hosted(6, epoch=6)

  counts = pool.counts()

  assert counts == PoolCounts(used=3, free=3, hosted=1, reserved=3, total=10)
  assert sorted(pool.free_ids) == [8, 9, 10]
  assert pool.is_conserved
  assert pool.num_lent == 3


def test_a_free_block_that_cannot_be_had_is_missed():
  pool = BlockPool(0, 11)
  pool._free.remove(9)

  assert pool.counts() == PoolCounts(
    used=0, free=10, hosted=0, reserved=0, total=10
  )
  assert not pool.is_conserved


def test_a_cancelled_move_leaves_the_block_live():
  pool = BlockPool(0, 3)
  pool.allocate(1, uid=7)
  pool.mark_live(1)
  pool.begin_move(1)
  pool.cancel_move(1)

  assert pool.block(1).state is BlockState.LIVE


def test_epochs_wrap_around_without_the_one_that_means_nobody():
  pool = BlockPool(0, 4)
  pool._last_epoch = 2**32 - 2

  grants = pool.allocate(3, uid=7)

  assert [location.epoch for location in grants] == [2**32 - 1, 1, 2]


def test_a_double_free_names_block_owner_and_history():
  pool = BlockPool(0, 3)
  pool.allocate(1, uid=7)
  pool.mark_live(1)
  pool.free(1, uid=7)

  with pytest.raises(
    InvariantError,
    match=r"Instance 0 cannot free for request 7 rBlock 1 \(free; owner:"
    r" request None of instance None; epoch 0; history: reserved \(request 7\)"
    r" -> live \(request 7\) -> free \(request 7\)\)",
  ):
    pool.free(1, uid=7)


def _own_reserved(pool):
  pool.allocate(1, uid=7)


def _own_live(pool):
  pool.allocate(1, uid=7)
  pool.mark_live(1)


def _lent_reserved(pool):
  pool.reserve_for(owner=1, uid=9, count=1)


def _lent_hosted(pool):
  pool.reserve_for(owner=1, uid=9, count=1)
  pool.commit_hosted(1, epoch=1)


def _nothing(pool):
  del pool


@pytest.mark.parametrize(
  ("prepare", "call"),
  [
    (_nothing, lambda pool: pool.mark_live(1)),
    (_nothing, lambda pool: pool.release_hosted(1, epoch=0)),
    (_own_reserved, lambda pool: pool.free(1, uid=8)),
    (_own_reserved, lambda pool: pool.begin_move(1)),
    (_own_reserved, lambda pool: pool.commit_hosted(1, epoch=1)),
    (_own_live, lambda pool: pool.mark_live(1)),
    (_own_live, lambda pool: pool.cancel_move(1)),
    (_own_live, lambda pool: pool.release_hosted(1, epoch=1)),
    (_lent_reserved, lambda pool: pool.mark_live(1)),
    (_lent_reserved, lambda pool: pool.free(1, uid=9)),
    (_lent_reserved, lambda pool: pool.commit_hosted(1, epoch=2)),
    (_lent_hosted, lambda pool: pool.commit_hosted(1, epoch=1)),
    (_lent_hosted, lambda pool: pool.release_hosted(1, epoch=2)),
    (_lent_hosted, lambda pool: pool.begin_move(1)),
    (_nothing, lambda pool: pool.block(0)),
    (_nothing, lambda pool: pool.block(3)),
    (_nothing, lambda pool: pool.allocate(-1, uid=7)),
    (_nothing, lambda pool: pool.reserve_for(owner=0, uid=7, count=1)),
  ],
)
def test_wrong_calls_raise_and_change_nothing(prepare, call):
  pool = BlockPool(0, 3)
  prepare(pool)
  before = pool.counts()

  with pytest.raises(InvariantError):
    call(pool)

  assert pool.counts() == before


def test_a_pool_of_the_null_block_alone_is_refused():
  with pytest.raises(
    ConfigError, match=r"num_blocks must be at least 2; got 1"
  ):
    BlockPool(0, 1)


class PoolMachine(stateful.RuleBasedStateMachine):
  """The pool against a dictionary from block to what it should be."""

  def __init__(self):
    super().__init__()
    self.pool = BlockPool(0, 8)
    self.model = {}  # block_id -> (state, uid, epoch, is_lent)
    self.epochs = set()

  def _pick(self, data, *states, is_lent=False):
    blocks = sorted(
      block_id
      for block_id, (state, _, _, lent) in self.model.items()
      if state in states and lent == is_lent
    )
    return data.draw(st.sampled_from(blocks)) if blocks else None

  def _change(self, block_id, state):
    self.model[block_id] = (state, *self.model[block_id][1:])

  @stateful.rule(
    count=st.integers(0, 4), uid=st.integers(1, 3), is_lent=st.booleans()
  )
  def reserve(self, count, uid, is_lent):
    free = sorted(set(range(1, 8)) - set(self.model))
    grants = (
      self.pool.reserve_for(owner=1, uid=uid, count=count)
      if is_lent
      else self.pool.allocate(count, uid)
    )
    if count > len(free):
      assert grants is None
      return
    assert [location.block_id for location in grants] == free[:count]
    for location in grants:
      assert location.epoch not in self.epochs
      self.epochs.add(location.epoch)
      self.model[location.block_id] = (
        BlockState.RESERVED,
        uid,
        location.epoch,
        is_lent,
      )

  @stateful.rule(data=st.data())
  def mark_live(self, data):
    if block_id := self._pick(data, BlockState.RESERVED):
      self.pool.mark_live(block_id)
      self._change(block_id, BlockState.LIVE)

  @stateful.rule(data=st.data())
  def begin_move(self, data):
    if block_id := self._pick(data, BlockState.LIVE):
      self.pool.begin_move(block_id)
      self._change(block_id, BlockState.MOVING)

  @stateful.rule(data=st.data())
  def cancel_move(self, data):
    if block_id := self._pick(data, BlockState.MOVING):
      self.pool.cancel_move(block_id)
      self._change(block_id, BlockState.LIVE)

  @stateful.rule(data=st.data())
  def commit_hosted(self, data):
    if block_id := self._pick(data, BlockState.RESERVED, is_lent=True):
      self.pool.commit_hosted(block_id, self.model[block_id][2])
      self._change(block_id, BlockState.HOSTED)

  @stateful.precondition(lambda self: self.model)
  @stateful.rule(data=st.data())
  def give_back(self, data):
    block_id = data.draw(st.sampled_from(sorted(self.model)))
    _, uid, epoch, is_lent = self.model.pop(block_id)
    if is_lent:
      self.pool.release_hosted(block_id, epoch)
    else:
      self.pool.free(block_id, uid)
    with pytest.raises(InvariantError):
      self.pool.free(block_id, uid)

  @stateful.invariant()
  def counts_are_those_of_the_model(self):
    states = collections.Counter(state for state, *_ in self.model.values())
    assert self.pool.counts() == PoolCounts(
      used=states[BlockState.LIVE] + states[BlockState.MOVING],
      free=7 - len(self.model),
      hosted=states[BlockState.HOSTED],
      reserved=states[BlockState.RESERVED],
      total=7,
    )
    assert sorted(self.pool.free_ids) == sorted({*range(1, 8)} - {*self.model})
    assert self.pool.is_conserved
    assert self.pool.num_lent == sum(m[3] for m in self.model.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = hypothesis.settings(
  max_examples=40, stateful_step_count=30
)


def test_a_pool_of_host_memory_says_so():
  pool = BlockPool(0, 3, tier=Tier.HOST)

  (location,) = pool.allocate(1, uid=7)

  assert location == Location(instance=0, block_id=1, epoch=1, tier=Tier.HOST)
  with pytest.raises(
    InvariantError, match="cannot begin to move HOST rBlock 1"
  ):
    pool.begin_move(1)


def test_epochs_later_than_the_last_are_from_the_future():
  pool = BlockPool(0, 4)
  pool.allocate(2, uid=7)

  assert [pool.is_from_the_future(epoch) for epoch in (1, 2, 3, 2**31)] == [
    False,
    False,
    True,
    True,
  ]


def test_the_future_goes_on_where_epochs_begin_anew():
  pool = BlockPool(0, 4, last_epoch=2**32 - 2)
  pool.allocate(2, uid=7)  # Under the last epoch and the first one.

  assert not pool.is_from_the_future(2**32 - 1)
  assert not pool.is_from_the_future(1)
  assert pool.is_from_the_future(2)
