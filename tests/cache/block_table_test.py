import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.content_tag import add_coverage, content_tag, mix_tag
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import InvariantError
from infinite_llm.types import Tier

P = 8


def _at(instance, block_id, epoch=None):
  epoch = 100 * instance + block_id if epoch is None else epoch
  return Location(instance=instance, block_id=block_id, epoch=epoch)


def _table(*locations, uid=7, home=0):
  table = BlockTable(uid, home, P)
  table.append(locations)
  return table


def _demand(table, num_tokens):
  """The definition: one term per rBlock, nothing remembered."""
  total = 0
  for logical_id in range(-(-num_tokens // P)):
    tag = content_tag(
      uid=table.uid,
      logical_id=logical_id,
      epoch=table.location(logical_id).epoch,
      filled=min(P, num_tokens - logical_id * P),
    )
    total = add_coverage(total, mix_tag(tag, logical_id))
  return total


def test_local_entries_are_those_at_home_in_order():
  table = _table(_at(0, 5), _at(2, 1), _at(0, 3))

  local = table.local_entries()

  assert local.block_ids.tolist() == [5, 3]
  assert local.logical_ids.tolist() == [0, 2]


def test_home_is_counted_up_to_a_logical_number():
  table = _table(_at(0, 5), _at(0, 6), _at(0, 3))
  assert table.is_home
  assert [table.num_home_below(n) for n in range(5)] == [0, 1, 2, 3, 3]

  table.switch(1, _at(2, 1))

  assert not table.is_home
  assert [table.num_home_below(n) for n in range(5)] == [0, 1, 1, 2, 2]
  assert [table.num_at(n) for n in range(3)] == [2, 0, 1]


def test_what_lies_in_host_is_neither_in_hbm_nor_elsewhere():
  table = _table(_at(0, 5), _at(0, 6), _at(0, 3))

  table.switch(0, Location(instance=0, block_id=9, epoch=1, tier=Tier.HOST))

  assert table.is_home
  assert table.creditors() == ()
  assert (table.num_host, table.num_at(0)) == (1, 2)
  assert [table.num_home_below(n) for n in range(5)] == [0, 0, 1, 2, 2]
  assert table.local_entries().block_ids.tolist() == [6, 3]
  assert [n for n, _ in table.hosted_entries(0)] == [1, 2]


@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, P), st.booleans()),
    max_size=12,
  )
)
def test_a_tag_is_that_of_the_content_whatever_was_asked_before(asked):
  table = _table(_at(0, 1), _at(0, 2), _at(0, 3))
  for number, (logical_id, filled, is_switched) in enumerate(asked):
    if is_switched:
      table.switch(logical_id, _at(0, 4, epoch=1000 + number))
    assert table.tag(logical_id, filled) == content_tag(
      uid=7,
      logical_id=logical_id,
      epoch=table.location(logical_id).epoch,
      filled=filled,
    )


def test_entries_elsewhere_are_found_by_creditor():
  table = _table(_at(0, 5), _at(2, 1), _at(1, 4), _at(2, 3))

  assert table.creditors() == (1, 2)
  assert table.hosted_entries(2) == ((1, _at(2, 1)), (3, _at(2, 3)))
  assert table.hosted_entries(1) == ((2, _at(1, 4)),)


def test_a_switch_names_the_new_copy_and_returns_the_old_one():
  table = _table(_at(0, 5), _at(0, 6))

  assert table.switch(0, _at(1, 9)) == _at(0, 5)

  assert table.location(0) == _at(1, 9)
  assert table.local_entries().block_ids.tolist() == [6]
  assert table.creditors() == (1,)
  assert table.switch(0, _at(0, 5)) == _at(1, 9)
  assert table.creditors() == ()


def test_entries_follow_appends():
  table = _table(_at(0, 5))
  assert table.local_entries().block_ids.tolist() == [5]

  table.append([_at(0, 6)])

  assert table.local_entries().block_ids.tolist() == [5, 6]


def test_appends_and_moves_of_the_oldest_keep_the_log():
  table = _table(_at(0, 5), _at(0, 6), _at(0, 7))
  before = table.local_entries()

  table.switch(0, _at(1, 9))
  table.append([_at(1, 2), _at(0, 8)])
  table.switch(1, _at(2, 9))
  table.switch(0, _at(2, 1))  # Between others: no matter at home.

  after = table.local_entries()
  assert after.log is before.log
  assert (before.begin, after.begin) == (0, 2)
  assert after.block_ids.tolist() == [7, 8]
  assert after.logical_ids.tolist() == [2, 4]
  assert before.block_ids.tolist() == [5, 6, 7]


def test_any_other_change_makes_a_new_log_and_leaves_the_old_one():
  table = _table(_at(0, 5), _at(0, 6), _at(0, 7))
  before = table.local_entries()

  table.switch(1, _at(1, 9))
  middle = table.local_entries()
  table.switch(1, _at(0, 4))
  after = table.local_entries()

  assert len({id(span.log) for span in (before, middle, after)}) == 3
  assert before.block_ids.tolist() == [5, 6, 7]
  assert middle.block_ids.tolist() == [5, 7]
  assert after.block_ids.tolist() == [5, 4, 7]


@hypothesis.given(
  events=st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2**16)), max_size=30
  )
)
def test_local_entries_are_the_locations_at_home_whatever_came_before(events):
  table = _table(_at(0, 1))
  for instance, number in events:
    if number % 3 == 0:
      table.append([_at(instance, number % 50)])
    else:
      table.switch(number % table.num_blocks, _at(instance, number % 50))
    if number % 5:
      local = table.local_entries()
      lies = [table.location(n) for n in range(table.num_blocks)]
      want = [
        (where.block_id, n)
        for n, where in enumerate(lies)
        if not where.instance
      ]
      got = zip(
        local.block_ids.tolist(), local.logical_ids.tolist(), strict=True
      )
      assert list(got) == want


@hypothesis.given(
  num_blocks=st.integers(1, 12),
  events=st.lists(
    st.tuples(st.booleans(), st.integers(0, 2**32 - 1)), max_size=20
  ),
)
def test_demand_is_the_sum_over_blocks_whatever_came_before(num_blocks, events):
  table = _table(*(_at(0, b) for b in range(1, num_blocks + 1)))
  for is_switch, number in events:
    if is_switch:
      table.switch(number % num_blocks, _at(1, 1, epoch=number or 1))
    num_tokens = number % (num_blocks * P + 1)

    assert table.demand(num_tokens) == _demand(table, num_tokens)


def test_demand_sees_what_went_wrong():
  good = _table(_at(0, 1), _at(0, 2))
  demand = good.demand(2 * P)

  assert _table(_at(0, 2), _at(0, 1)).demand(2 * P) != demand
  assert _table(_at(0, 1, epoch=9), _at(0, 2)).demand(2 * P) != demand
  assert _table(_at(0, 1), _at(0, 2), uid=8).demand(2 * P) != demand
  assert good.demand(2 * P - 1) != demand
  assert good.demand(2 * P) == demand


def test_rblocks_are_counted_where_they_lie():
  table = _table(_at(0, 1), _at(0, 2), _at(3, 1))

  table.switch(0, _at(3, 5))

  assert (table.num_at(0), table.num_at(3), table.num_at(4)) == (1, 2, 0)


def test_demand_of_no_tokens_is_nothing():
  assert _table(_at(0, 1)).demand(0) == 0


def test_demand_beyond_the_table_is_refused():
  with pytest.raises(
    InvariantError, match=r"Request 7 has 1 rBlocks of 8 .* hold 9 tokens"
  ):
    _table(_at(0, 1)).demand(9)


@pytest.mark.parametrize("logical_id", [-1, 1])
def test_an_unknown_logical_number_is_refused(logical_id):
  with pytest.raises(InvariantError, match=rf"\[0, 1\).* got {logical_id}\."):
    _table(_at(0, 1)).location(logical_id)
