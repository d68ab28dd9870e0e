import dataclasses
import enum
from typing import Annotated, Literal

import pytest

from infinite_llm.scheduler.message_schema import SchemaError, make_schema
from infinite_llm.types import Range


class _Colour(enum.Enum):
  RED = "red"
  BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
  low: int
  high: int

  def __post_init__(self):
    if self.low > self.high:
      raise ValueError(f"low must not exceed high; got {self}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Empty:
  pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shelf:
  pairs: tuple[_Pair, ...]
  label: str | None
  colour: _Colour


type _Alias = _Pair | _Empty
type _Percent = Annotated[int, Range(low=0, high=100)]


@pytest.mark.parametrize(
  ("annotation", "value", "document"),
  [
    (int, 3, 3),
    (_Percent, 100, 100),
    (float, 0.5, 0.5),
    (bool, True, True),
    (str, "a", "a"),
    (None, None, None),
    (int | None, None, None),
    (int | Literal["all"], "all", "all"),
    (Literal[1, "b"], "b", "b"),
    (_Colour, _Colour.BLUE, "blue"),
    (tuple[int, ...], (1, 2), [1, 2]),
    (tuple[int, ...], (), []),
    (tuple[int, str], (1, "x"), [1, "x"]),
    (tuple[_Colour, ...], (_Colour.RED,), ["red"]),
    (tuple[_Colour, int], (_Colour.RED, 7), ["red", 7]),
    (_Pair, _Pair(low=1, high=2), {"low": 1, "high": 2}),
    (_Alias, _Empty(), {"_Empty": {}}),
    (_Alias | None, _Pair(low=1, high=2), {"_Pair": {"low": 1, "high": 2}}),
    (_Alias | None, None, None),
    (
      _Shelf,
      _Shelf(pairs=(_Pair(low=0, high=0),), label=None, colour=_Colour.RED),
      {"pairs": [{"low": 0, "high": 0}], "label": None, "colour": "red"},
    ),
  ],
)
def test_a_value_travels_as_this_document(annotation, value, document):
  schema = make_schema(annotation)
  encoded = schema.encode(value) if schema.encode else value

  assert (list(encoded) if isinstance(encoded, tuple) else encoded) == document
  decoded = schema.decode(document)
  assert decoded == value
  assert type(decoded) is type(value)


@pytest.mark.parametrize(
  ("annotation", "document", "text"),
  [
    (int, -1, r"document must be an integer in \[0, \d+\]; got -1\."),
    (int, 2**63, "must be an integer"),
    (int, True, "must be an integer"),
    (int, 1.0, "must be an integer"),
    (_Percent, 101, r"must be an integer in \[0, 100\]; got 101\."),
    (float, "1", "must be a finite number; got '1'"),
    (float, float("nan"), "must be a finite number; got nan"),
    (float, 10**400, "must be a finite number"),
    (float, True, "must be a finite number; got True"),
    (bool, 1, "must be true or false; got 1"),
    (str, "\ud800", "must be a string of ASCII characters"),
    (Literal[1, "b"], True, "must be one of 1, 'b'; got True"),
    (Literal["b"], [], r"must be 'b'; got \[\]"),
    (_Colour, "green", "must be one of 'red', 'blue'; got 'green'"),
    (int | None, "1", r"must be an integer in .* or None; got '1'"),
    (tuple[int, ...], 1, "must be a list; got 1"),
    (tuple[int, ...], [1, "x"], r"^\[1\] must be an integer"),
    (tuple[int, str], [1], r"must be a list of 2; got \[1\]"),
    (tuple[int, str], [1, 2], r"^\[1\] must be a string"),
    (_Pair, [], r"must be an object for _Pair; got \[\]"),
    (_Pair, {"low": 1}, r"with the fields low, high; got \['low'\]"),
    (_Pair, {"low": 1, "high": 2, "x": 3}, "with the fields low, high; got"),
    (_Pair, {"low": 2, "high": 1}, "is no _Pair: low must not exceed high"),
    (_Empty, {"x": 1}, r"with the fields none; got \['x'\]"),
    (_Alias, {"Other": {}}, "with one key out of _Pair, _Empty; got"),
    (_Alias, {}, "with one key out of _Pair, _Empty; got {}"),
    (_Alias, {"_Pair": {"low": 1, "high": "2"}}, r"^_Pair\.high must be"),
    (
      _Shelf,
      {"pairs": [{"low": 0, "high": None}], "label": None, "colour": "red"},
      r"^pairs\[0\]\.high must be an integer in .*; got None\.",
    ),
  ],
)
def test_a_document_that_does_not_fit_is_refused(annotation, document, text):
  with pytest.raises(SchemaError, match=text):
    make_schema(annotation).decode(document)


@pytest.mark.parametrize(
  "annotation",
  [dict[str, int], list[int], object, bytes, _Colour | None, set[int]],
)
def test_an_annotation_that_cannot_travel_is_refused(annotation):
  with pytest.raises(TypeError, match=r"cannot carry|must be dataclasses or"):
    make_schema(annotation)
