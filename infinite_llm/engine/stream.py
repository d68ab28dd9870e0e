"""One request's way from tokens to text, and when it ends."""

from collections.abc import Mapping
from typing import Any

import tokenizers

from infinite_llm.engine.detokenizer import Detokenizer
from infinite_llm.engine.outputs import (
  Extent,
  OutputRecord,
  RequestOutput,
  TokenLogprob,
)
from infinite_llm.engine.sampling import NO_TOKEN
from infinite_llm.models.loaded_model import GenerationDefaults
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.types import InstanceId


class OutputStream:
  """Takes tokens one by one; knows why a request ends."""

  def __init__(
    self,
    request: Request,
    tokenizer: tokenizers.Tokenizer | None,
    generation: GenerationDefaults,
    instance: InstanceId,
  ):
    """Starts with no token.

    Args:
      request: The request; gets the tokens.
      tokenizer: Turns tokens into text; None leaves the text empty.
      generation: The model's end-of-sequence tokens.
      instance: The owner, to report.
    """
    sampling = request.sampling
    self._request = request
    self._instance = instance
    self._detokenizer = tokenizer and Detokenizer(
      tokenizer,
      stop=sampling.stop,
      include_stop=sampling.include_stop_str_in_output,
      skip_special_tokens=sampling.skip_special_tokens,
      prompt_token_ids=request.prompt_token_ids,
    )
    self._end_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
      self._end_ids |= frozenset(generation.eos_token_ids)
    self._record = OutputRecord(
      token_ids=request.output_token_ids,
      pieces=[],
      logprobs=None if sampling.logprobs is None else [],
    )
    self._seen = Extent()

  def push(self, sampled: Mapping[str, Any]) -> RequestStatus | None:
    """Takes the next token.

    Args:
      sampled: Scalar `token`; where log-probabilities are asked for `logprob`
        too, and vectors `top_ids` and `top_logprobs`, as `Sampled` has them for
        one row.

    Returns:
      How the request ends with it, `FAILED` if the logits were no
      distribution and there is no token; None if it goes on.
    """
    token = int(sampled["token"])
    if token == NO_TOKEN:
      return RequestStatus.FAILED
    request = self._request
    if self._record.logprobs is not None:
      self._record.logprobs.append(self._logprob(token, sampled))
    request.output_token_ids.append(token)
    is_end = token in self._end_ids
    is_silent = is_end and not request.sampling.include_stop_str_in_output
    if self._detokenizer is not None and not is_silent:
      self._add_text(self._detokenizer.append(token))
    if is_end or self._is_stopped:
      status = RequestStatus.FINISHED_STOPPED
    elif request.num_tokens >= request.max_total_tokens:
      status = RequestStatus.FINISHED_LENGTH
    else:
      return None
    if self._detokenizer is not None and not self._is_stopped:
      self._add_text(self._detokenizer.finish())
    return status

  def output(
    self, reason: str | None, error: Exception | None = None
  ) -> RequestOutput:
    """What the caller sees now.

    Args:
      reason: Why the request ended; None if it goes on.
      error: What went wrong, if the reason is "error".

    Returns:
      The output; new in it is what came since the last call.
    """
    seen, self._seen = self._seen, self._record.extent
    return RequestOutput(
      uid=self._request.uid,
      request_id=self._request.request_id,
      prompt_token_ids=self._request.prompt_token_ids,
      finish_reason=reason,
      error=error,
      instance=self._instance,
      record=self._record,
      extent=self._seen,
      seen=seen,
    )

  def _add_text(self, piece: str) -> None:
    if piece:
      self._record.pieces.append(piece)

  @property
  def _is_stopped(self) -> bool:
    return self._detokenizer is not None and self._detokenizer.is_stopped

  def _logprob(self, token: int, sampled: Mapping[str, Any]) -> TokenLogprob:
    count = self._request.sampling.logprobs or 0
    return TokenLogprob(
      token_id=token,
      logprob=float(sampled["logprob"]),
      top={
        int(i): float(x)
        for i, x in zip(
          sampled["top_ids"][:count],
          sampled["top_logprobs"][:count],
          strict=True,
        )
      },
    )
