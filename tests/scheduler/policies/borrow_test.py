import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler import policies
from infinite_llm.scheduler.ledger import ClusterView, LedgerLine
from infinite_llm.scheduler.policies import borrow


def _view(**lendable):
  return ClusterView(
    lines=tuple(
      LedgerLine(instance=int(name[1:]), free=room, lendable=room, debts=())
      for name, room in lendable.items()
    )
  )


def test_most_room_comes_first():
  view = _view(i0=9, i1=5, i2=7, i3=6)

  assert borrow.rank_creditors(view, 0) == (2, 3, 1)


def test_the_nearest_of_equals_comes_first_then_the_lower_number():
  #  debtor 3:     distance 3, 1, -, 1, 2
  view = _view(i0=5, i2=5, i3=5, i4=5, i5=5)

  assert borrow.rank_creditors(view, 3) == (2, 4, 5)


def test_nobody_without_room_is_proposed():
  assert borrow.rank_creditors(_view(i0=9, i1=0, i2=1), 0) == (2,)
  assert borrow.rank_creditors(_view(i0=9, i1=0), 0) == ()


def test_an_unknown_debtor_gets_candidates_all_the_same():
  assert borrow.rank_creditors(_view(i1=2), 0) == (1,)


@hypothesis.given(
  room=st.dictionaries(st.integers(0, 20), st.integers(0, 5), max_size=12),
  debtor=st.integers(0, 20),
)
@hypothesis.settings(derandomize=True)
def test_candidates_are_few_different_others_with_room(room, debtor):
  view = _view(**{f"i{instance}": room[instance] for instance in sorted(room)})

  candidates = borrow.rank_creditors(view, debtor)

  assert len(candidates) == len(set(candidates)) <= 3
  assert all(room[c] > 0 and c != debtor for c in candidates)
  left = [n for i, n in room.items() if i not in (*candidates, debtor)]
  assert all(room[c] >= n for c in candidates for n in left)
  assert candidates == borrow.rank_creditors(view, debtor)


def test_the_request_with_most_movable_blocks_makes_room():
  assert borrow.choose_victim([(7, 2), (8, 5), (9, 0)]) == 8
  assert borrow.choose_victim([(9, 5), (8, 5)]) == 8
  assert borrow.choose_victim([(7, 0)]) is None
  assert borrow.choose_victim([]) is None


def test_the_static_policy_shares_nothing():
  policy = policies.get_policy("static")

  assert policy.rank_creditors(_view(i0=9, i1=9), 0) == ()
  assert policy.choose_victim([(7, 5)]) is None


def test_an_unknown_policy_is_refused_with_the_known_names():
  with pytest.raises(ConfigError, match=r"borrow, static; got 'greedy'"):
    policies.get_policy("greedy")
