"""Any message that the types of its fields allow, and absurd ones."""

import dataclasses
import math
import types
from typing import (
  Annotated,
  Literal,
  TypeAliasType,
  Union,
  get_args,
  get_origin,
  get_type_hints,
)

from hypothesis import strategies as st

from infinite_llm.scheduler.lease_messages import (
  Grant,
)
from infinite_llm.scheduler.messages import (
  Envelope,
)


def values(annotation):
  """Values of an annotation, as its author means it."""
  if isinstance(annotation, TypeAliasType):
    return values(annotation.__value__)
  origin, arguments = get_origin(annotation), get_args(annotation)
  if origin is Annotated:
    allowed = arguments[1]
    return st.integers(allowed.low, allowed.high)
  if origin is Literal:
    return st.sampled_from(arguments)
  if origin in (Union, types.UnionType):
    return st.one_of([values(argument) for argument in arguments])
  if origin is tuple and arguments[-1] is Ellipsis:
    return st.lists(values(arguments[0]), max_size=3).map(tuple)
  if origin is tuple:
    return st.tuples(*map(values, arguments))
  if dataclasses.is_dataclass(annotation):
    if annotation is Grant:  # Names no null block and no missing epoch.
      real = st.integers(1, 2**31 - 1)
      return st.builds(Grant, block_id=real, epoch=real)
    hints = get_type_hints(annotation, include_extras=True)
    fields = {name: values(hint) for name, hint in hints.items()}
    return st.builds(annotation, **fields)
  if annotation is float:
    return st.floats(allow_nan=False, allow_infinity=False)
  if annotation is int:
    return st.integers(0, 2**63 - 1)
  if annotation is float:
    return st.floats(allow_nan=False, allow_infinity=False)
  return st.from_type(annotation)


def kinds(annotation):
  """Dataclasses of a union, those of unions inside it included."""
  if isinstance(annotation, TypeAliasType):
    return kinds(annotation.__value__)
  if get_origin(annotation) in (Union, types.UnionType):
    return [kind for part in get_args(annotation) for kind in kinds(part)]
  return [annotation]


ENVELOPES = st.deferred(lambda: values(Envelope))

_INTEGERS = (
  *(-(2**63), -1, 0, 1, 2, 3, 7, 8, 9),
  *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1),
)
_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300)


def places(message, start=()):
  """`(path, value)` of all fields and items of a message from a field on."""
  value = message
  for step in start:
    value = getattr(value, step)
  return list(_places(value, tuple(start)))


def _places(value, path):
  is_pair = isinstance(value, tuple) and path and isinstance(path[-1], int)
  if not is_pair:  # Types are kept: a pair stays one.
    yield path, value
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from _places(getattr(value, field.name), (*path, field.name))
  elif isinstance(value, tuple):
    for index, item in enumerate(value):
      yield from _places(item, (*path, index))


def replaced(value, path, new):
  """A message with something else in one place."""
  if not path:
    return new
  step, *rest = path
  if isinstance(step, int):
    items = list(value)
    items[step] = replaced(items[step], rest, new)
    return tuple(items)
  changed = replaced(getattr(value, step), rest, new)
  return dataclasses.replace(value, **{step: changed})


def absurd(value):
  """What may stand in a value's place, if nobody minds."""
  if isinstance(value, bool):
    return (not value,)
  if isinstance(value, int):
    return (value - 1, value + 1, -value, *_INTEGERS)
  if isinstance(value, float):
    return _NUMBERS
  if isinstance(value, tuple):
    return ((), value * 2, value * 1000, value[::-1])
  return (value,)
