import pytest

from infinite_llm.scheduler.request import RequestStatus
from tests.scheduler.fake_engine import make_request


def test_tokens_reach_over_prompt_and_output():
  request = make_request(1, 3)
  request.output_token_ids += [10, 11]

  assert request.num_tokens == 5
  assert request.token_ids == (0, 1, 2, 10, 11)
  assert request.tokens(0, 2) == (0, 1)
  assert request.tokens(2, 4) == (2, 10)
  assert request.tokens(4, 5) == (11,)


def test_a_decode_step_is_one_uncomputed_token():
  request = make_request(1, 3)
  assert request.num_uncomputed == 3

  request.num_computed_tokens = 3
  request.output_token_ids.append(10)

  assert request.num_uncomputed == 1


def test_only_waiting_and_running_requests_are_unfinished():
  unfinished = [status for status in RequestStatus if not status.is_finished]

  assert unfinished == [RequestStatus.WAITING, RequestStatus.RUNNING]


@pytest.mark.parametrize("uid", [0, 2**32])
def test_a_uid_that_is_no_positive_uint32_is_refused(uid):
  with pytest.raises(ValueError, match=rf"uid must be in .*; got {uid}\."):
    make_request(uid, 3)


def test_an_empty_prompt_is_refused():
  with pytest.raises(ValueError, match=r"prompt_token_ids must not be empty"):
    make_request(1, 0)


def test_an_arrival_is_a_number_that_messages_can_name():
  with pytest.raises(ValueError, match=r"arrival must be at least 1; got 0\."):
    make_request(1, 3, arrival=0)
