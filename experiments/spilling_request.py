"""A request that no instance can hold, and how far it is."""

import ml_collections

from experiments.steady_load import AnyEngine
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.sampling_params import SamplingParams

_NAME = "long"


class SpillingRequest:
  """The request that no instance can hold."""

  def __init__(self, engine: AnyEngine, config: ml_collections.ConfigDict):
    """Asks for it.

    Args:
      engine: Who is asked.
      config: See `configs/no_spill_cost.py`.
    """
    self._engine = engine
    self._wanted = config.long.max_tokens
    self._last: RequestOutput | None = None
    prompt = [
      n % config.model.vocab_size for n in range(config.long.prompt_tokens)
    ]
    engine.add_request(
      prompt,
      SamplingParams(max_tokens=self._wanted, ignore_eos=True),
      request_id=_NAME,
      instance=config.long.instance,
    )

  def take(self, output: RequestOutput) -> None:
    """Notes what it got."""
    self._last = output

  def lent(self) -> list[int]:
    """rBlocks that each instance lends now."""
    return [
      sum(count for _, count in each.lent)
      for each in self._engine.use().instances
    ]

  def has_spilled(self) -> bool:
    """Whether anything was moved to others, and they have said so."""
    return self._engine.use().num_blocks_moved > 0 and any(self.lent())

  def has_token(self) -> bool:
    """Whether its prompt is done."""
    return self._last is not None

  def has_ended(self) -> bool:
    """Whether it got all its tokens, or failed."""
    return self._last is not None and self._last.is_finished

  def done_tokens(self) -> int:
    """Tokens of its prompt that are computed, and of its answer."""
    done, _ = self._engine.progress(_NAME)
    if self._last is None:
      return done
    return len(self._last.prompt_token_ids) + self._last.extent.num_tokens

  def faults(self) -> list[str]:
    """What went wrong."""
    last = self._last
    if last is not None and last.extent.num_tokens == self._wanted:
      return []
    return [f"the long request ended with {last and (last.error or last)}"]
