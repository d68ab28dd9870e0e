import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.swap_costs import SwapCosts, swap_is_faster


@pytest.mark.parametrize(
  ("num_bytes", "num_tokens", "expected"),
  [
    (500, 10, False),  # 2 * 500 / 1000 = 1 s against 10 / 10 = 1 s
    (499, 10, True),
    (500, 11, True),
    (0, 0, False),
  ],
)
def test_the_way_out_and_the_way_back_are_weighed_against_prefill(
  num_bytes, num_tokens, expected
):
  assert swap_is_faster(num_bytes, 1000.0, num_tokens, 10.0) is expected


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
