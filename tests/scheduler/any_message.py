"""Strategies for any message that the types of its fields allow."""

import dataclasses
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
