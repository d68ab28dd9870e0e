"""Which rows the next step of an instance has, as values."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping

from infinite_llm.config import SchedulerConfig
from infinite_llm.scheduler.request import Request
from infinite_llm.types import RequestUid, value_type


@value_type
class Row:
  """Tokens of one request that a step computes.

  Attributes:
    uid: The request.
    start: Position of the first of them.
    num_tokens: How many, at least 1.
    samples: Whether the last one is the request's last, so that the step yields
      its next token.
  """

  uid: RequestUid
  start: int
  num_tokens: int
  samples: bool

  @property
  def end(self) -> int:
    """Tokens of the request that are computed after the step."""
    return self.start + self.num_tokens


@value_type
class StepPlan:
  """Rows of one instance's next step, by the program that computes them.

  Attributes:
    local_decode: One token each, all rBlocks at home.
    local_prefill: Many tokens each, all rBlocks at home.
    group_decode: One token each, rBlocks elsewhere too; and, where such a step
      runs anyway, those of `local_decode`.
    group_prefill: At most one row with rBlocks elsewhere.
    layered: At most one row, of any length, with rBlocks in HOST.
    group_layered: At most one with rBlocks in HOST and elsewhere.
  """

  local_decode: tuple[Row, ...] = ()
  local_prefill: tuple[Row, ...] = ()
  group_decode: tuple[Row, ...] = ()
  group_prefill: tuple[Row, ...] = ()
  layered: tuple[Row, ...] = ()
  group_layered: tuple[Row, ...] = ()

  def joined(self) -> "StepPlan":
    """The same with one decode step, that of the group.

    It goes through the model once, so a row more costs next to nothing there,
    and a step of its own as much as all of it.
    """
    return dataclasses.replace(
      self, local_decode=(), group_decode=self.group_decode + self.local_decode
    )

  @property
  def rows(self) -> tuple[Row, ...]:
    """All rows."""
    return (
      self.local_decode
      + self.local_prefill
      + self.group_decode
      + self.group_prefill
      + self.layered
      + self.group_layered
    )


@value_type
class GroupRows:
  """Which rows of group steps there are, or may be.

  Attributes:
    decode: Whether any of one token.
    prefill_tokens: Most tokens of one with many.
    layered_tokens: Most tokens of one with rBlocks in HOST.
  """

  decode: bool
  prefill_tokens: int
  layered_tokens: int


NOTHING = GroupRows(decode=False, prefill_tokens=0, layered_tokens=0)
EVERYTHING = GroupRows(
  decode=True, prefill_tokens=sys.maxsize, layered_tokens=sys.maxsize
)


@value_type
class Ceiling:
  """Which rows a plan may have.

  Attributes:
    group: Of group steps.
    long: Whether any of a local step that takes longer than a decode step: of
      a prompt, or with rBlocks in HOST.
    is_joined: Whether others may wait for such a step, for the next turn.
    is_behind: Whether the step is launched behind one of the instance that is
      under way: only what disturbs none of its rows.
  """

  group: GroupRows = EVERYTHING
  long: bool = True
  is_joined: bool = False
  is_behind: bool = False


ANY = Ceiling()


def _no_rows() -> list[Row]:  # `list[Row]()` takes ten times as long.
  return []


@dataclasses.dataclass(kw_only=True)
class Draft:
  """A plan in the making, and what its programs still have room for.

  Attributes:
    local_decode: As of `StepPlan`, and so are the others.
    local_prefill: Rows.
    group_decode: Rows.
    group_prefill: Rows.
    layered: Rows.
    group_layered: Rows.
    ceiling: Which rows there may be.
  """

  ceiling: Ceiling = ANY
  local_decode: list[Row] = dataclasses.field(default_factory=_no_rows)
  local_prefill: list[Row] = dataclasses.field(default_factory=_no_rows)
  group_decode: list[Row] = dataclasses.field(default_factory=_no_rows)
  group_prefill: list[Row] = dataclasses.field(default_factory=_no_rows)
  layered: list[Row] = dataclasses.field(default_factory=_no_rows)
  group_layered: list[Row] = dataclasses.field(default_factory=_no_rows)

  def add(self, row: Row, *, is_group: bool, is_layered: bool) -> None:
    """Puts a row where its program is.

    Args:
      row: Of a request.
      is_group: Whether that has rBlocks elsewhere.
      is_layered: Whether it has some in HOST.
    """
    is_decode = row.samples and row.num_tokens == 1
    if is_layered:
      rows = self.group_layered if is_group else self.layered
    elif is_group:
      rows = self.group_decode if is_decode else self.group_prefill
    else:
      rows = self.local_decode if is_decode else self.local_prefill
    rows.append(row)

  def prefill_room(self, scheduler: SchedulerConfig, chunk_tokens: int) -> int:
    """Tokens that one more row of the local prefill program may have.

    Args:
      scheduler: How many rows it may have.
      chunk_tokens: How many tokens.
    """
    is_full = len(self.local_prefill) == scheduler.prefill_rows
    if is_full or not self.ceiling.long:
      return 0
    used = sum(row.num_tokens for row in self.local_prefill)
    return chunk_tokens - used

  def plan(self) -> StepPlan:
    """The plan as it is now."""
    return StepPlan(
      local_decode=tuple(self.local_decode),
      local_prefill=tuple(self.local_prefill),
      group_decode=tuple(self.group_decode),
      group_prefill=tuple(self.group_prefill),
      layered=tuple(self.layered),
      group_layered=tuple(self.group_layered),
    )


def next_group_rows(
  spilled: Iterable[Request],
  layered: RequestUid | None,
  under_way: Mapping[RequestUid, Row],
  chunk_tokens: Callable[[Request], int],
) -> GroupRows:
  """Foresees what requests have for the group steps after those under way.

  Args:
    spilled: Running requests with rBlocks elsewhere.
    layered: The one of them that has some in HOST too; None if none has.
    under_way: Rows that are launched and not yet committed; they are taken for
      done.
    chunk_tokens: Most tokens of a request's next row.
  """
  decode, prefill_tokens, layered_tokens = False, 0, 0
  for request in spilled:
    row = under_way.get(request.uid)
    start = request.num_computed_tokens if row is None else row.end
    # A row that samples is followed by one for the new token.
    rest = max(request.num_tokens - start, 1)
    tokens = min(rest, chunk_tokens(request))
    if request.uid == layered:
      layered_tokens = max(layered_tokens, tokens)
    elif rest == 1:
      decode = True
    else:
      prefill_tokens = max(prefill_tokens, tokens)
  return GroupRows(
    decode=decode, prefill_tokens=prefill_tokens, layered_tokens=layered_tokens
  )
