"""A request as the scheduler sees it."""

import dataclasses
import enum

from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import RequestUid


class RequestStatus(enum.Enum):
  """Where a request is in its life."""

  WAITING = "waiting"
  RUNNING = "running"
  FINISHED_STOPPED = "finished_stopped"
  FINISHED_LENGTH = "finished_length"
  FINISHED_ABORTED = "finished_aborted"
  FAILED = "failed"

  @property
  def is_finished(self) -> bool:
    """Whether the request has ended, well or not."""
    return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)

  @property
  def finish_reason(self) -> str | None:
    """What callers are told: the field's word; None if it goes on."""
    return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
  RequestStatus.FINISHED_STOPPED: "stop",
  RequestStatus.FINISHED_LENGTH: "length",
  RequestStatus.FINISHED_ABORTED: "abort",
  RequestStatus.FAILED: "error",
}


@dataclasses.dataclass(kw_only=True)
class Request:
  """One prompt and what was generated for it so far.

  There is no prefill or decode phase: a step computes tokens
  `[num_computed_tokens, num_computed_tokens + n)` and samples if and only if
  that reaches `num_tokens`.

  Attributes:
    uid: Non-zero uint32, never used twice in a lending group.
    request_id: The caller's name for it.
    prompt_token_ids: Its prompt, at least one token.
    sampling: How its tokens are chosen.
    arrival: Rises from request to request, from 1 on: who came first.
    max_total_tokens: Most tokens that prompt and output may have.
    output_token_ids: Tokens generated so far.
    num_computed_tokens: Tokens whose KV is present and proved.
    num_launched_tokens: Those, and the tokens of rows that are under way.
    furthest_tokens: Most tokens that were ever computed and proved; a
      recomputation makes no progress until it is past them.
    attempts: Coverage failures since the last progress.
    num_recomputed: Times that its KV was computed anew for such failures, since
      it had `recomputed_from` tokens.
    recomputed_from: `furthest_tokens` when that count began.
    group_token_s: Seconds per token of its last group prefill step; 0 before
      one was measured.
    stands_aside: Whether it must not run for now, for others to go on.
    status: Where it is in its life.
    error: Why it failed, if it did.
  """

  uid: RequestUid
  request_id: str
  prompt_token_ids: tuple[int, ...]
  sampling: SamplingParams
  arrival: int
  max_total_tokens: int
  output_token_ids: list[int] = dataclasses.field(default_factory=list[int])
  num_computed_tokens: int = 0
  num_launched_tokens: int = 0
  furthest_tokens: int = 0
  attempts: int = 0
  num_recomputed: int = 0
  recomputed_from: int = 0
  group_token_s: float = 0.0
  stands_aside: bool = False
  status: RequestStatus = RequestStatus.WAITING
  error: Exception | None = None

  def __post_init__(self):
    if not 0 < self.uid < 2**32:
      raise ValueError(f"uid must be in [1, 2**32); got {self.uid}.")
    if self.arrival < 1:  # In messages 0 is nobody's.
      raise ValueError(f"arrival must be at least 1; got {self.arrival}.")
    if not self.prompt_token_ids:
      raise ValueError("prompt_token_ids must not be empty; got ().")

  @property
  def num_tokens(self) -> int:
    """Tokens of the prompt and the output so far."""
    return len(self.prompt_token_ids) + len(self.output_token_ids)

  @property
  def num_coming_tokens(self) -> int:
    """The same, with one that a row under way samples."""
    return max(self.num_tokens, self.num_launched_tokens + 1)

  @property
  def num_uncomputed(self) -> int:
    """Tokens whose KV is still to be computed, at least 1 while it runs."""
    return self.num_tokens - self.num_computed_tokens

  @property
  def num_unlaunched(self) -> int:
    """Tokens that no row was launched for, at least 1 while it runs."""
    return self.num_coming_tokens - self.num_launched_tokens

  def begin_at(self, num_tokens: int) -> None:
    """Notes that the KV of so many tokens is there, and no row under way."""
    self.num_computed_tokens = self.num_launched_tokens = num_tokens

  @property
  def token_ids(self) -> tuple[int, ...]:
    """All tokens so far: a copy, so not for every step of a long request."""
    return self.tokens(0, self.num_tokens)

  def tokens(self, start: int, end: int) -> tuple[int, ...]:
    """Tokens at positions `[start, end)`."""
    num_prompt = len(self.prompt_token_ids)
    prompt = self.prompt_token_ids[start:end]
    output = self.output_token_ids[
      max(start - num_prompt, 0) : max(end - num_prompt, 0)
    ]
    return prompt + tuple(output)
