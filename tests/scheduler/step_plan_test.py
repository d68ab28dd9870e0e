"""What is foreseen of the group steps after those under way."""

import pytest

from infinite_llm.scheduler.step_plan import GroupRows, Row, next_group_rows
from tests.scheduler.fake_engine import make_request


def row(start, num_tokens, samples):
  return Row(uid=1, start=start, num_tokens=num_tokens, samples=samples)


class TestGroupRows:
  @staticmethod
  def request(num_prompt, num_computed, num_output=0):
    request = make_request(1, num_prompt)
    request.num_computed_tokens = num_computed
    request.output_token_ids.extend([5] * num_output)
    return request

  @pytest.mark.parametrize(
    ("made", "under_way", "rows"),
    [
      ((100, 0), None, (False, 64)),
      ((100, 64), None, (False, 36)),
      # The chunk that is under way counts as done; a token follows the last.
      ((100, 0), (0, 64, False), (False, 36)),
      ((100, 64), (64, 36, True), (True, 0)),
      ((100, 100, 1), None, (True, 0)),
      ((100, 100, 1), (100, 1, True), (True, 0)),
    ],
  )
  def test_a_request_goes_on_where_its_row_ends(self, made, under_way, rows):
    flying = {} if under_way is None else {1: row(*under_way)}
    got = next_group_rows([self.request(*made)], None, flying, lambda _: 64)
    assert got == GroupRows(
      decode=rows[0], prefill_tokens=rows[1], layered_tokens=0
    )

  @pytest.mark.parametrize(
    ("made", "under_way", "tokens"),
    [
      ((100, 64), None, 36),
      ((100, 64), (64, 36, True), 1),
      ((100, 100, 1), None, 1),
    ],
  )
  def test_one_that_attends_host_has_steps_of_its_own(
    self, made, under_way, tokens
  ):
    flying = {} if under_way is None else {1: row(*under_way)}
    got = next_group_rows([self.request(*made)], 1, flying, lambda _: 64)
    assert got == GroupRows(
      decode=False, prefill_tokens=0, layered_tokens=tokens
    )

  def test_several_requests_share_the_turn(self):
    requests = [self.request(100, 70), self.request(100, 100, 1)]
    got = next_group_rows(requests, None, {}, lambda _: 64)
    assert got == GroupRows(decode=True, prefill_tokens=30, layered_tokens=0)
