"""Whether a preempted request is better copied or computed again."""

import dataclasses
import math

from infinite_llm.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapCosts:
  """What the two ways to get a request's KV back are made of.

  Attributes:
    block_bytes: Size of one rBlock.
    link_bytes_per_s: Speed of copies between HBM and HOST, each way.
    recompute_tokens_per_s: Speed of prefill.
  """

  block_bytes: int
  link_bytes_per_s: float
  recompute_tokens_per_s: float

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      # Written so that NaN is refused too.
      if not 0 < value < math.inf:
        raise ConfigError(
          f"{field.name} must be positive and finite; got {value!r}."
        )


def swap_is_faster(
  num_bytes: int,
  link_bytes_per_s: float,
  num_tokens: int,
  recompute_tokens_per_s: float,
) -> bool:
  """Compares copying KV to HOST and back with computing it again.

  Both ways count: the way out keeps the request in need waiting, the way back
  the one that left.

  Args:
    num_bytes: Size of the KV.
    link_bytes_per_s: Speed of copies, each way.
    num_tokens: Tokens of the KV.
    recompute_tokens_per_s: Speed of prefill.

  Returns:
    Whether the two copies take less time; of equals, computing is simpler.
  """
  copies_s = 2 * num_bytes / link_bytes_per_s
  return copies_s < num_tokens / recompute_tokens_per_s
