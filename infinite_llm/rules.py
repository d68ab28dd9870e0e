"""Rules that values of a configuration keep, and what a message says."""

import itertools
import math

from infinite_llm.errors import ConfigError


def require(holds: bool, name: str, rule: str, value: object) -> None:
  """Refuses a value: the message gives the argument, the rule, the value.

  Raises:
    ConfigError: If the rule does not hold.
  """
  if not holds:
    raise ConfigError(f"{name} must be {rule}; got {value!r}.")


def require_integer(name: str, value: object) -> None:
  """Refuses what is no integer; a bool is none."""
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  require(is_integer, name, "an integer", value)


def require_seconds(config: object, *names: str) -> None:
  """Refuses fields that are no positive, finite numbers."""
  for name in names:
    value = getattr(config, name)
    holds = _is_number(value) and 0 < value < math.inf
    require(holds, name, "positive and finite", value)


def require_shares(config: object, *names: str) -> None:
  """Refuses fields that are no numbers from 0 to 1."""
  for name in names:
    value = getattr(config, name)
    require(_is_number(value) and 0 <= value <= 1, name, "in [0, 1]", value)


def require_buckets(config: object, *names: str) -> None:
  """Makes fields tuples; they must be rising token or row counts."""
  for name in names:
    buckets = tuple(getattr(config, name))
    object.__setattr__(config, name, buckets)
    for bucket in buckets:
      require_integer(f"{name}[...]", bucket)
    require(
      bool(buckets)
      and buckets[0] >= 1
      and all(a < b for a, b in itertools.pairwise(buckets)),
      name,
      "positive, rising and not empty",
      buckets,
    )


def require_positive(config: object, *names: str) -> None:
  """Refuses fields that are no integers of at least 1."""
  for name in names:
    value = getattr(config, name)
    require_integer(name, value)
    require(value >= 1, name, "at least 1", value)


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
