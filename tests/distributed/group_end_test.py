"""How members end, with both ends of the links in this process."""

import pytest

from infinite_llm.distributed.group_end import await_close
from infinite_llm.distributed.group_messages import Call, Close
from infinite_llm.errors import GroupError
from tests.distributed.group_link_test import Links

_TIMEOUT_S = 20.0


@pytest.fixture(name="links")
def _links():
  links = Links()
  yield links
  links.close()


def test_a_member_waits_for_close(links):
  leader, first, second = links.joined()
  leader.send(2, Close())
  await_close(second, _TIMEOUT_S)
  with pytest.raises(GroupError, match=r"Process 0 said nothing for 0\.2 s\."):
    await_close(first, 0.2)
  assert leader.lost is None


def test_a_member_that_waits_hears_that_its_leader_is_gone(links):
  leader, first, _ = links.joined()
  leader.close()
  with pytest.raises(GroupError, match=r"Process 0 is gone\."):
    await_close(first, _TIMEOUT_S)


def test_nothing_else_may_be_said(links):
  leader, first, _ = links.joined()
  leader.send(1, Call(number=1))
  with pytest.raises(GroupError, match="must say nothing but Close; got Call"):
    await_close(first, _TIMEOUT_S)
