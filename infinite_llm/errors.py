"""Exceptions that callers of Infinite-LLM may want to catch.

Every message names the argument or object, the rule and the value.
"""

import enum


class ConfigError(ValueError):
  """A configuration that cannot work, found before anything was started."""


class CheckpointError(ValueError):
  """A checkpoint that is unreadable, truncated or does not fit its config."""


class RequestError(ValueError):
  """A request that can never be served; no other request is disturbed."""


class CapacityError(RequestError):
  """A request that needs more rBlocks than all reachable instances have."""


class CoverageError(RuntimeError):
  """A request whose KV could not be proved intact within its retries."""


class ModelError(RuntimeError):
  """Logits that are no distribution: a NaN, or nothing finite."""


class GroupError(RuntimeError):
  """A group that cannot begin or go on: a process of it is missing or gone."""


class InvariantError(RuntimeError):
  """A broken invariant of the books: a bug, never a shortage."""


class Refusal(enum.Enum):
  """Why a message from elsewhere is refused."""

  MALFORMED = "malformed"
  OVERSIZED = "oversized"
  UNVERSIONED = "unversioned"
  UNAUTHENTICATED = "unauthenticated"
  MISDIRECTED = "misdirected"


class MessageError(ValueError):
  """A message that is refused; it changed nothing.

  Attributes:
    refusal: What kind of refusal it is, for counting.
  """

  def __init__(self, refusal: Refusal, text: str):
    super().__init__(text)
    self.refusal = refusal
