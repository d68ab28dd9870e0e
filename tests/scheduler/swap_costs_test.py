import math

import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.swap_costs import SwapCosts


@pytest.mark.parametrize(
  ("num_blocks", "num_tokens", "expected"),
  [
    (500, 10, False),  # 2 * 500 / 1000 = 1 s against 10 / 10 = 1 s
    (499, 10, True),
    (500, 11, True),
    (0, 0, False),
  ],
)
def test_the_way_out_and_the_way_back_are_weighed_against_prefill(
  num_blocks, num_tokens, expected
):
  costs = SwapCosts(
    block_bytes=1, link_bytes_per_s=1000.0, recompute_tokens_per_s=10.0
  )
  assert costs.swap_is_faster(num_blocks, num_tokens) is expected


@pytest.mark.parametrize(
  ("num_tokens", "seconds"),
  [
    (1000, 1000 / 100 * 1.5),  # All attend 500 on average: half as much again.
    (2000, 2000 / 100 * 2),
    (8000, 8000 / 100 * 5),
  ],
)
def test_a_long_context_takes_longer_by_what_it_attends(num_tokens, seconds):
  costs = SwapCosts(
    block_bytes=10**6,
    link_bytes_per_s=1e6,
    recompute_tokens_per_s=100.0,
    doubling_tokens=1000,
  )
  assert costs.recompute_s(num_tokens) == pytest.approx(seconds)
  # By what prefill takes without attention, copies would never pay.
  num_blocks = num_tokens // 100
  assert costs.copies_s(num_blocks) == pytest.approx(2 * num_tokens / 100)
  assert costs.swap_is_faster(num_blocks, num_tokens) is (num_tokens > 2000)


@pytest.mark.parametrize(
  "name", ["block_bytes", "link_bytes_per_s", "recompute_tokens_per_s"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_costs_must_be_positive_and_finite(name, value):
  costs = {
    "block_bytes": 1,
    "link_bytes_per_s": 1.0,
    "recompute_tokens_per_s": 1.0,
  }

  with pytest.raises(ConfigError) as raised:
    SwapCosts(**costs | {name: value})

  assert str(raised.value) == (
    f"{name} must be positive and finite; got {value!r}."
  )


@pytest.mark.parametrize("value", [0, -1, float("nan"), -math.inf])
def test_the_context_of_twice_the_time_may_be_infinite_only(value):
  costs = {
    "block_bytes": 1,
    "link_bytes_per_s": 1.0,
    "recompute_tokens_per_s": 1.0,
  }
  with pytest.raises(ConfigError, match=r"doubling_tokens must be positive; "):
    SwapCosts(**costs, doubling_tokens=value)
  assert SwapCosts(**costs, doubling_tokens=math.inf).recompute_s(7) == 7.0
