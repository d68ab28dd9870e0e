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
    recompute_tokens_per_s: Speed of prefill where there is little to attend.
    doubling_tokens: Context at which attention takes a prompt's token as long
      as all else does, so that it takes twice as long; infinite if attention
      costs nothing that grows.
  """

  block_bytes: int
  link_bytes_per_s: float
  recompute_tokens_per_s: float
  doubling_tokens: float = math.inf

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      is_optional = field.name == "doubling_tokens"
      if is_optional and value == math.inf:
        continue
      # Written so that NaN is refused too.
      if not 0 < value < math.inf:
        rule = "positive" if is_optional else "positive and finite"
        raise ConfigError(f"{field.name} must be {rule}; got {value!r}.")

  def copies_s(self, num_blocks: int) -> float:
    """Seconds of copying rBlocks to HOST and back.

    Both ways count: the way out keeps the request in need waiting, the way back
    the one that left.
    """
    return 2 * num_blocks * self.block_bytes / self.link_bytes_per_s

  def recompute_s(self, num_tokens: int) -> float:
    """Seconds of computing so many tokens again.

    Each attends all before it: half of them on average.
    """
    growth = 1 + num_tokens / (2 * self.doubling_tokens)
    return num_tokens / self.recompute_tokens_per_s * growth

  def swap_is_faster(self, num_blocks: int, num_tokens: int) -> bool:
    """Compares copying KV to HOST and back with computing it again.

    Args:
      num_blocks: rBlocks of the KV.
      num_tokens: Tokens of it.

    Returns:
      Whether the two copies take less time; of equals, computing is simpler.
    """
    return self.copies_s(num_blocks) < self.recompute_s(num_tokens)
