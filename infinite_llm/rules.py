"""Rules that values of a configuration keep, and what a message says."""

import itertools
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from infinite_llm.errors import ConfigError

_SCALE_LIMITS = (1.2e-38, 7.5e35)
"""Of scales: normal in float32, and so is 448 times each, the largest number of
float8_e4m3fn."""


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
    require(_is_number(value), name, "a number", value)


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


def require_seconds(config: object, *names: str) -> None:
  """Refuses fields that are no positive, finite numbers."""
  require_numbers(config, *names)
  for name in names:
    value = getattr(config, name)
    require(0 < value < math.inf, name, "positive and finite", value)


def require_shares(config: object, *names: str) -> None:
  """Refuses fields that are no numbers from 0 to 1."""
  require_numbers(config, *names)
  for name in names:
    value = getattr(config, name)
    require(0 <= value <= 1, name, "in [0, 1]", value)


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


def _is_number(value: object) -> bool:
  """Whether it is a real number, of NumPy too; a bool is none."""
  return not isinstance(value, bool) and isinstance(value, numbers.Real)


def require_kv_scales(
  name: str, scales: np.ndarray, shape: tuple[int, int, int] | None = None
) -> None:
  """Refuses what cannot be scales of keys and values.

  Args:
    name: The argument.
    scales: Of any shape and dtype.
    shape: L, 2 and K of the model; None is not known.

  Raises:
    ConfigError: If it is no `[L, 2, K]` of positive normal float32.
  """
  letters = "[L, 2, K]" if shape is None else f"[L, 2, K] = {list(shape)}"
  is_right = scales.ndim == 3 and scales.shape[1] == 2 and scales.size > 0
  require(
    is_right if shape is None else scales.shape == shape,
    name,
    f"{letters}: layers, keys and values, KV heads",
    list(scales.shape),
  )
  require_scales(name, scales)


def require_scales(name: str, scales: np.ndarray) -> None:
  """Refuses scales that are no positive normal float32.

  Args:
    name: The argument.
    scales: Of any shape and dtype.

  Raises:
    ConfigError: If one is not; the message says where it is.
  """
  low, high = _SCALE_LIMITS
  is_number = scales.dtype.kind in "iuf"
  require(is_number, name, "an array of numbers", str(scales.dtype))
  for place, value in np.ndenumerate(scales):
    where = f"{name}[{', '.join(map(str, place))}]" if place else name
    # NaN is in no interval.
    require(low <= value <= high, where, f"in [{low}, {high}]", float(value))


def scales_as_tuples(
  name: str, scales: Any
) -> str | tuple[tuple[tuple[float, ...], ...], ...]:
  """Makes scales hashable and comparable.

  Args:
    name: The argument.
    scales: Path of a file, or an array or nested sequences `[L, 2, K]`.

  Returns:
    The path as text, or nested tuples of float32 values.

  Raises:
    ConfigError: If it is neither, or a scale is not positive.
  """
  if isinstance(scales, str | os.PathLike):
    return os.fspath(scales)
  try:
    array = np.asarray(scales)
    require_kv_scales(name, array)
  except (TypeError, ValueError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(
      f"{name} must be a path or an array [L, 2, K]; got {scales!r}."
    ) from error
  narrow = array.astype(np.float32).tolist()
  return tuple(tuple(tuple(heads) for heads in layer) for layer in narrow)
