"""How time in which nothing goes on is counted."""

import pytest

from infinite_llm.config import LendingConfig
from infinite_llm.engine.request_book import RequestBook
from infinite_llm.engine.stall import REPORT_EVERY_S, StallBreaker


@pytest.mark.parametrize(
  "is_shared, round_s", [(False, 0.005), (True, REPORT_EVERY_S)]
)
def test_a_round_is_no_shorter_than_reports_are_old(is_shared, round_s):
  """Else process 0 would judge by what was so some rounds ago."""
  now_s = 0.0
  stall = StallBreaker(
    LendingConfig(resend_after_s=0.005, heartbeat_every_s=0.005),
    lambda: now_s,
    RequestBook([0]),
    [0],
    [],
    is_shared=is_shared,
  )

  for _ in range(500):
    now_s += 0.001
    stall.wait()

  assert stall.rounds == pytest.approx(0.5 / round_s, abs=1)
  stall.progress()
  assert stall.rounds == 0
