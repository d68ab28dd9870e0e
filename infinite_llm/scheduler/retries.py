"""How often a request may fail to prove its KV before it is given up."""

from infinite_llm.errors import CoverageError
from infinite_llm.scheduler.request import Request
from infinite_llm.types import InstanceId

_RECOMPUTE_WINDOW_TOKENS = 64
"""Progress after which recomputations are forgiven. Each may give one token, by
the prefill step that it ends with: where only decode steps fail, a request
would go on for ever, at the price of its whole context a token."""


def failed(
  request: Request, instance: InstanceId, most: int
) -> CoverageError | None:
  """Notes that KV of a request could not be proved.

  Args:
    request: The request; progress sets its attempts back.
    instance: Its owner.
    most: Attempts that it has.

  Returns:
    What it ends with; None if it may try again.
  """
  request.attempts += 1
  if request.attempts <= most:
    return None
  return CoverageError(
    f"Request {request.request_id} on instance {instance} could not prove its"
    f" KV intact {request.attempts} times since token"
    f" {request.furthest_tokens}; max_row_attempts is {most}."
  )


def recomputed(
  request: Request, instance: InstanceId, most: int
) -> CoverageError | None:
  """Notes that KV of a request has to be computed anew.

  Args:
    request: The request; progress forgives old times.
    instance: Its owner.
    most: Times that it may, within a window of progress.

  Returns:
    What it ends with; None if it may be computed anew.
  """
  progress = request.furthest_tokens - request.recomputed_from
  if progress >= _RECOMPUTE_WINDOW_TOKENS:
    request.recomputed_from = request.furthest_tokens
    request.num_recomputed = 0
  request.num_recomputed += 1
  if request.num_recomputed <= most:
    return None
  return CoverageError(
    f"Request {request.request_id} on instance {instance} had to compute its KV"
    f" anew {request.num_recomputed} times since token"
    f" {request.recomputed_from}, the last one {request.furthest_tokens};"
    f" max_row_attempts is {most}."
  )
