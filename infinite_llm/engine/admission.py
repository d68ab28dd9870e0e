"""Which requests can be served at all. Pure functions of the configuration."""

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np

from infinite_llm.config import EngineConfig
from infinite_llm.errors import CapacityError, RequestError
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.request import Request
from infinite_llm.types import InstanceId, RequestUid


def reachable_tokens(config: EngineConfig) -> int:
  """Tokens that one request could have if it were alone in its group.

  In the HBM of all instances, and in its own host memory.
  """
  cache = config.cache
  own = cache.capacity_tokens // cache.block_size
  in_hbm = config.lending.reachable_blocks(own, config.num_instances)
  with_host = in_hbm - own + cache.overflow_blocks
  return max(in_hbm, with_host) * cache.block_size


def as_token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
  """Takes token ids as plain integers, from whatever holds them.

  Args:
    prompt: A sequence of integers, or a one-dimensional array of them.

  Returns:
    The ids.

  Raises:
    RequestError: If that is not what it is.
  """
  if isinstance(prompt, np.ndarray) and (
    prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
  ):
    return tuple(prompt.tolist())  # In a tenth of the time.
  try:
    tokens = tuple(prompt)
  except TypeError:
    raise RequestError(
      f"prompt must be a text or a sequence of token ids; got {prompt!r}."
    ) from None
  try:
    return tuple(map(operator.index, tokens))
  except TypeError:
    return tuple(map(_as_token_id, tokens))


def _as_token_id(token: int) -> int:
  try:
    return operator.index(token)
  except TypeError:
    raise RequestError(
      f"prompt token ids must be integers; got {token!r}."
    ) from None


def check_request(
  prompt: Sequence[int],
  sampling: SamplingParams,
  instance: InstanceId | None,
  config: EngineConfig,
  vocab_size: int,
  *,
  has_tokenizer: bool = True,
) -> None:
  """Refuses a request that can never be served.

  Args:
    prompt: Its token ids.
    sampling: How to choose its tokens.
    instance: The owner that the caller asked for; None leaves it open.
    config: Sizes and rules of the group.
    vocab_size: V of the model.
    has_tokenizer: Whether its answer can have a text.

  Raises:
    RequestError: If an argument is wrong.
    CapacityError: If the prompt is larger than all reachable memory.
  """
  if not isinstance(sampling, SamplingParams):
    raise RequestError(f"sampling must be SamplingParams; got {sampling!r}.")
  if len(prompt) == 0:
    raise RequestError("prompt must have at least one token; got none.")
  for token in (min(prompt), max(prompt)):
    if not 0 <= token < vocab_size:
      raise RequestError(
        f"prompt token ids must be in [0, {vocab_size}); got {token}."
      )
  if instance is not None and instance not in range(config.num_instances):
    raise RequestError(
      f"instance must be in [0, {config.num_instances}); got {instance!r}."
    )
  if (sampling.logprobs or 0) > config.max_logprobs:
    raise RequestError(
      f"logprobs must be at most max_logprobs = {config.max_logprobs}; got"
      f" {sampling.logprobs}."
    )
  if sampling.stop and not has_tokenizer:
    raise RequestError(
      "stop must be empty, since the checkpoint has no tokenizer.json; got"
      f" {sampling.stop!r}."
    )
  available = reachable_tokens(config)
  if len(prompt) + 1 > available:
    cache = config.cache
    with_host = cache.overflow_blocks * cache.block_size
    host = f" ({with_host} with host memory)" if with_host else ""
    raise CapacityError(
      f"The prompt needs room for {len(prompt) + 1} tokens (one of them for the"
      f" answer), but all reachable rBlocks hold {available}:"
      f" {config.num_instances} instance(s) of"
      f" {cache.capacity_tokens} tokens{host}, policy"
      f" {config.lending.policy!r}."
    )


def new_request(
  uid: RequestUid,
  request_id: str,
  prompt: tuple[int, ...],
  sampling: SamplingParams,
  config: EngineConfig,
) -> Request:
  """Makes a request of what was checked; it gets a seed if it brings none."""
  if sampling.seed is None:
    seed = derived_seed(config.seed, uid)
    sampling = dataclasses.replace(sampling, seed=seed)
  return Request(
    uid=uid,
    request_id=request_id,
    prompt_token_ids=prompt,
    sampling=sampling,
    arrival=uid,
    max_total_tokens=min(
      len(prompt) + sampling.max_tokens, reachable_tokens(config)
    ),
  )


def derived_seed(seed: int, uid: RequestUid) -> int:
  """Seed of a request that brings none: differs by request, not by run."""
  return (seed * 0x9E3779B1 + uid * 0x85EBCA77) % 2**32
