"""Rules that values of a configuration keep, and what a message says."""

import itertools
import numbers
from collections.abc import Sequence
from typing import cast

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


def require_numbers(config: object, *names: str) -> None:
  """Refuses fields that are no real numbers; a bool is none, a NaN is one."""
  for name in names:
    value = getattr(config, name)
    is_number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    require(is_number, name, "a number", value)


def require_flags(config: object, *names: str) -> None:
  """Refuses fields that are neither True nor False: a "no" would be true."""
  for name in names:
    value = getattr(config, name)
    require(isinstance(value, bool), name, "True or False", value)


def require_texts(config: object, *names: str) -> None:
  """Refuses fields that are neither a text nor None."""
  for name in names:
    value = getattr(config, name)
    require(isinstance(value, str | None), name, "None or a text", value)


def require_choice(config: object, name: str, choices: Sequence[str]) -> None:
  """Refuses a field that is none of the choices."""
  value = getattr(config, name)
  require(value in choices, name, f"one of {', '.join(choices)}", value)


def require_buckets(config: object, *names: str) -> None:
  """Makes fields tuples; they must be rising token or row counts."""
  for name in names:
    value = cast(object, getattr(config, name))
    is_sequence = not isinstance(value, str) and isinstance(value, Sequence)
    require(is_sequence, name, "a sequence of integers", cast(object, value))
    buckets = tuple(cast(Sequence[int], value))
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
