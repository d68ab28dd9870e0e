"""Turns value types into JSON documents and back, held to their types.

The annotations are the schema: a new kind of message needs no code here. What
they do not say, a class says in its `__post_init__`.
"""

import dataclasses
import enum
import reprlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import (
  Annotated,
  Any,
  Literal,
  TypeAliasType,
  Union,
  cast,
  get_args,
  get_origin,
  get_type_hints,
)

from infinite_llm.types import Range, Text

_ANY_COUNT = Range(low=0, high=2**63 - 1)
"""What an `int` without a range of its own may be: nothing here is negative."""

type Document = Any
"""What `json` makes and takes: dicts, sequences, strings, numbers, None."""


class SchemaError(ValueError):
  """A document that does not fit; the text says where and why."""

  def __init__(self, rule: str):
    super().__init__(rule)
    self._rule = rule
    self._path: list[str] = []

  def inside(self, step: str) -> "SchemaError":
    """The same error, seen from the value around it."""
    self._path.insert(0, step)
    return self

  def __str__(self) -> str:
    place = "".join(self._path).removeprefix(".") or "document"
    return f"{place} {self._rule}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
  """How values of one annotation travel.

  Attributes:
    name: What they are, for error texts.
    encode: Value to document; None leaves it as it is.
    decode: Document to value; raises `SchemaError`.
  """

  name: str
  encode: Callable[[Any], Document] | None
  decode: Callable[[Document], Any]


def make_schema(annotation: Any) -> Schema:
  """Builds the schema of an annotation.

  Args:
    annotation: A value type, `int` (with or without a `Range`), `float`,
      `bool`, `str`, `Text`, None, an enum, a `Literal`, a tuple, a union or a
      type alias of these.

  Returns:
    Its schema.

  Raises:
    TypeError: If it is anything else, naming it.
  """
  if isinstance(annotation, TypeAliasType):
    return make_schema(annotation.__value__)
  origin, arguments = get_origin(annotation), get_args(annotation)
  if origin is Annotated and arguments[0] is int:
    ranges = [note for note in arguments[1:] if isinstance(note, Range)]
    return _integer(*ranges or [_ANY_COUNT])
  if annotation == Text:
    return _TEXT
  if origin is Literal:
    return _choice({value: value for value in arguments})
  if origin in (Union, types.UnionType):
    return _union(_members(annotation))
  if origin is tuple and arguments[-1] is Ellipsis:
    return _sequence(make_schema(arguments[0]))
  if origin is tuple:
    return _tuple([make_schema(argument) for argument in arguments])
  if annotation is int:
    return _integer(_ANY_COUNT)
  if annotation in (None, types.NoneType):
    return _choice({None: None})
  if annotation in _SCALARS:
    return _SCALARS[annotation]
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return _choice({member.value: member for member in annotation})
  if _is_record(annotation):
    return _record(cast("type[Any]", annotation))
  raise TypeError(f"Messages cannot carry {annotation!r}.")


def _wrong(rule: str, value: Document) -> SchemaError:
  return SchemaError(f"must be {rule}; got {reprlib.repr(value)}.")


def _integer(allowed: Range) -> Schema:
  low, high = allowed.low, allowed.high
  name = f"an integer in [{low}, {high}]"

  def decode(value: Document) -> int:
    # `True` is an int to `isinstance`.
    if type(value) is not int or not low <= value <= high:
      raise _wrong(name, value)
    return value

  return Schema(name=name, encode=None, decode=decode)


def _decode_float(value: Document) -> float:
  if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
    raise _wrong("a finite number", value)
  return float(value)


def _decode_bool(value: Document) -> bool:
  if type(value) is not bool:
    raise _wrong("true or false", value)
  return value


def _decode_str(value: Document) -> str:
  # JSON can spell half a surrogate pair, which no later encoder takes.
  if type(value) is not str or not value.isascii():
    raise _wrong("a string of ASCII characters", value)
  return value


def _decode_text(value: Document) -> str:
  if type(value) is not str or not _is_encodable(value):
    raise _wrong("a string of whole characters", value)
  return value


def _is_encodable(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


_TEXT = Schema(name="a text", encode=None, decode=_decode_text)

_SCALARS: dict[Any, Schema] = {
  float: Schema(name="a finite number", encode=None, decode=_decode_float),
  bool: Schema(name="true or false", encode=None, decode=_decode_bool),
  str: Schema(name="a string", encode=None, decode=_decode_str),
}


def _choice(values: dict[Any, Any]) -> Schema:
  """One of a few values, each sent as the document that names it."""
  name = "one of " + ", ".join(map(repr, values))
  if len(values) == 1:
    name = repr(*values)
  types_of: set[Any] = {type(document) for document in values}
  documents = {value: document for document, value in values.items()}
  is_itself = all(value is document for document, value in values.items())

  def decode(value: Document) -> Any:
    # A dict or list cannot be looked up, and True would find 1.
    if type(value) not in types_of or value not in values:
      raise _wrong(name, value)
    return values[value]

  encode = None if is_itself else documents.__getitem__
  return Schema(name=name, encode=encode, decode=decode)


def _sequence(item: Schema) -> Schema:
  name = f"a list, each {item.name}"
  encode_item, decode_item = item.encode, item.decode

  def encode(values: Sequence[Any]) -> Document:
    return [encode_item(value) if encode_item else value for value in values]

  def decode(value: Document) -> tuple[Any, ...]:
    if type(value) is not list:
      raise _wrong("a list", value)
    items = cast("list[Document]", value)
    decoded: list[Any] = []
    try:
      for document in items:
        decoded.append(decode_item(document))
    except SchemaError as error:
      raise error.inside(f"[{len(decoded)}]")  # noqa: B904
    return tuple(decoded)

  return Schema(name=name, encode=encode_item and encode, decode=decode)


def _tuple(items: Sequence[Schema]) -> Schema:
  name = f"a list of {len(items)}"
  decoders = [item.decode for item in items]
  encoders = [item.encode or _as_it_is for item in items]
  is_plain = all(item.encode is None for item in items)

  def encode(values: Sequence[Any]) -> Document:
    pairs = zip(encoders, values, strict=True)
    return [encode_item(value) for encode_item, value in pairs]

  def decode(value: Document) -> tuple[Any, ...]:
    if type(value) is not list:
      raise _wrong(name, value)
    documents = cast("list[Document]", value)
    if len(documents) != len(decoders):
      raise _wrong(name, value)
    decoded: list[Any] = []
    try:
      for decode_item, document in zip(decoders, documents, strict=True):
        decoded.append(decode_item(document))
    except SchemaError as error:
      raise error.inside(f"[{len(decoded)}]")  # noqa: B904
    return tuple(decoded)

  return Schema(name=name, encode=None if is_plain else encode, decode=decode)


def _record(kind: type[Any]) -> Schema:
  """A dataclass, sent as an object with exactly its fields."""
  name = f"an object for {kind.__name__}"
  hints = get_type_hints(kind, include_extras=True)
  schemas = {
    field.name: make_schema(hints[field.name])
    for field in dataclasses.fields(kind)
  }
  encoders = [
    (field, schema.encode or _as_it_is) for field, schema in schemas.items()
  ]
  decoders = [(field, schema.decode) for field, schema in schemas.items()]

  def encode(value: Any) -> Document:
    return {
      field: encode_field(getattr(value, field))
      for field, encode_field in encoders
    }

  def decode(value: Document) -> Any:
    if type(value) is not dict:
      raise _wrong(name, value)
    documents = cast("dict[str, Document]", value)
    if documents.keys() != schemas.keys():
      fields = ", ".join(schemas) or "none"
      raise _wrong(f"{name} with the fields {fields}", sorted(documents))
    decoded: dict[str, Any] = {}
    for field, decode_field in decoders:
      try:
        decoded[field] = decode_field(documents[field])
      except SchemaError as error:
        raise error.inside(f".{field}")  # noqa: B904
    try:
      return kind(**decoded)
    except ValueError as error:
      raise SchemaError(f"is no {kind.__name__}: {error}") from error

  return Schema(name=name, encode=encode, decode=decode)


def _union(members: Sequence[Any]) -> Schema:
  """Dataclasses are told apart by a key, other members by their documents."""
  kinds: dict[str, tuple[Any, Schema]] = {
    member.__name__: (member, make_schema(member))
    for member in members
    if _is_record(member)
  }
  others = [make_schema(m) for m in members if not _is_record(m)]
  if any(other.encode is not None for other in others):
    raise TypeError(
      "Members of a union must be dataclasses or plain values; got"
      f" {' | '.join(map(str, members))}."
    )
  names = [f"an object with one key out of {', '.join(kinds)}"] if kinds else []
  name = " or ".join(names + [other.name for other in others])
  encoders: dict[Any, tuple[str, Callable[[Any], Document]]] = {
    kind: (tag, schema.encode or _as_it_is)
    for tag, (kind, schema) in kinds.items()
  }

  def encode(value: Any) -> Document:
    if type(value) not in encoders:
      return value
    tag, encode_kind = encoders[type(value)]
    return {tag: encode_kind(value)}

  def decode(value: Document) -> Any:
    if type(value) is dict and len(cast("dict[str, Document]", value)) == 1:
      ((tag, document),) = cast("dict[str, Document]", value).items()
      if tag in kinds:
        try:
          return kinds[tag][1].decode(document)
        except SchemaError as error:
          raise error.inside(f".{tag}")  # noqa: B904
    for other in others:
      try:
        return other.decode(value)
      except SchemaError:
        continue
    raise _wrong(name, value)

  return Schema(name=name, encode=encode if kinds else None, decode=decode)


def _members(annotation: Any) -> list[Any]:
  """Members of a union, those of unions inside it included."""
  if isinstance(annotation, TypeAliasType):
    return _members(annotation.__value__)
  if get_origin(annotation) in (Union, types.UnionType):
    return [
      inner for member in get_args(annotation) for inner in _members(member)
    ]
  return [annotation]


def _is_record(annotation: Any) -> bool:
  return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _as_it_is(value: Any) -> Any:
  return value
