"""What a caller gets of a request, while it runs and when it is done."""

import dataclasses
from typing import NamedTuple

from infinite_llm.types import RequestUid


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


class Extent(NamedTuple):
  """How much of a record there was at some moment.

  Attributes:
    num_tokens: Tokens.
    num_pieces: Pieces of text.
  """

  num_tokens: int = 0
  num_pieces: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRecord:
  """All that was generated for a request: it grows, and nothing else.

  Attributes:
    token_ids: The tokens.
    pieces: Their text; joined, it is all of it.
    logprobs: One entry per token, if they were asked for.
  """

  token_ids: list[int]
  pieces: list[str]
  logprobs: list[TokenLogprob] | None

  @property
  def extent(self) -> Extent:
    """How much there is now."""
    return Extent(len(self.token_ids), len(self.pieces))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RequestOutput:
  """State of a request after a step; the last one has a `finish_reason`.

  It is a view of the record that all outputs of the request share, so making
  one costs nothing, however long the answer is. It never changes: what it does
  not cover is not seen through it. Tokens and text are copied each time that
  they are read.

  Attributes:
    uid: Number of the request: no other of its group ever has it.
    request_id: Name of the request.
    prompt_token_ids: Its prompt.
    finish_reason: "stop", "length", "abort" or "error"; None while it runs.
    error: Why it ended, if the reason is "error".
    instance: The instance that ran it.
    record: What was generated, perhaps more by now than this output covers.
    extent: How much of it this output covers.
    seen: How much of it an earlier output covered.
  """

  uid: RequestUid
  request_id: str
  prompt_token_ids: tuple[int, ...]
  finish_reason: str | None
  error: Exception | None
  instance: int
  record: OutputRecord = dataclasses.field(repr=False)
  extent: Extent
  seen: Extent

  @property
  def token_ids(self) -> tuple[int, ...]:
    """Tokens generated so far."""
    return tuple(self.record.token_ids[: self.extent.num_tokens])

  @property
  def new_token_ids(self) -> tuple[int, ...]:
    """Those that are new since the last output."""
    return tuple(
      self.record.token_ids[self.seen.num_tokens : self.extent.num_tokens]
    )

  @property
  def text(self) -> str:
    """Text of the tokens so far, as far as it is certain."""
    return "".join(self.record.pieces[: self.extent.num_pieces])

  @property
  def new_text(self) -> str:
    """The part of it that is new since the last output."""
    return "".join(
      self.record.pieces[self.seen.num_pieces : self.extent.num_pieces]
    )

  @property
  def logprobs(self) -> tuple[TokenLogprob, ...] | None:
    """One entry per token, if they were asked for."""
    if self.record.logprobs is None:
      return None
    return tuple(self.record.logprobs[: self.extent.num_tokens])

  @property
  def is_finished(self) -> bool:
    """Whether this is the last output of the request."""
    return self.finish_reason is not None

  def after(self, seen: Extent) -> "RequestOutput":
    """The same for a reader who has seen less, or more, than all outputs.

    Args:
      seen: What the last output covered that the reader got.

    Returns:
      An output whose new tokens and text begin there.
    """
    return dataclasses.replace(self, seen=seen)
