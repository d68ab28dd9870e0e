"""What a caller gets of a request, while it runs and when it is done."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprob:
  """Log-probabilities at one step, of the model's own distribution.

  Attributes:
    token_id: The chosen token.
    logprob: Its natural-log probability.
    top: `{token id: logprob}` of the most likely tokens, best first.
  """

  token_id: int
  logprob: float
  top: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
  """State of a request after a step; the last one has a `finish_reason`.

  Attributes:
    request_id: Name of the request.
    prompt_token_ids: Its prompt.
    token_ids: Tokens generated so far.
    text: Their text so far; without a stop string.
    new_text: The part of `text` that is new since the last output.
    finish_reason: "stop", "length", "abort" or "error"; None while it runs.
    logprobs: One entry per token, if they were asked for.
    error: Why it ended, if the reason is "error".
    instance: The instance that ran it.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  text: str
  new_text: str
  finish_reason: str | None
  logprobs: tuple[TokenLogprob, ...] | None
  error: Exception | None
  instance: int

  @property
  def is_finished(self) -> bool:
    """Whether this is the last output of the request."""
    return self.finish_reason is not None
