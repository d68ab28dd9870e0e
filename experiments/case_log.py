"""What the cases of `no_spill_cost` gave, as far as they are."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_Row = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class CaseLog:
  """What some cases gave; it can be written to a file, and joined by others.

  Attributes:
    is_exact: Whether equal prompts must have equal answers.
    on_change: Called when a case began or ended.
    device: Kind of device that they ran on; None while unknown.
    rows: What each instance saw in each case.
    launches: Programs that the sharing engine launched in each of its cases.
    long: How fast the long request was.
    faults: What was not as it must be.
    answers: The longest beginning that is known of the answer to each prompt.
    num_compared: Answers that were held against those known before, as far as
      both went.
    num_different: Those among them that were others.
    took_s: Time of each case; None while it runs.
  """

  is_exact: bool
  on_change: Callable[["CaseLog"], None] | None = None
  device: str | None = None
  rows: list[_Row] = dataclasses.field(default_factory=list)
  launches: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  long: _Row = dataclasses.field(default_factory=dict)
  faults: list[str] = dataclasses.field(default_factory=list)
  answers: dict[str, Sequence[int]] = dataclasses.field(default_factory=dict)
  num_compared: int = 0
  num_different: int = 0
  took_s: dict[str, float | None] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def timed(self, case: str) -> Iterator[None]:
    """Says when a case begins and ends, and how long it took."""
    before = dict(self.took_s)
    self.took_s[case] = None
    self._tell(before)
    started_s = time.perf_counter()
    yield
    before = dict(self.took_s)
    self.took_s[case] = time.perf_counter() - started_s
    self._tell(before)

  def compare(self, what: str, answers: Mapping[str, Sequence[int]]) -> None:
    """Holds answers against those known of the same prompts.

    Args:
      what: Whose they are, for the fault if some are others.
      answers: Answers, or their beginnings, by prompt.
    """
    different = 0
    for name, answer in answers.items():
      known = self.answers.get(name, ())
      both = min(len(known), len(answer))
      is_same = tuple(known[:both]) == tuple(answer[:both])
      self.num_compared += both > 0
      different += not is_same
      if is_same and len(answer) > both:
        self.answers[name] = answer
    self.num_different += different
    # In bfloat16 two tokens are often equally likely, by random weights.
    if different and self.is_exact:
      self.faults.append(f"{what}: {different} answers are others")

  def join(self, name: str, other: "CaseLog") -> None:
    """Adds what cases gave elsewhere.

    Args:
      name: Who ran them.
      other: What they gave.
    """
    self.device = self.device or other.device
    self.rows += other.rows
    self.launches |= other.launches
    self.long |= other.long
    self.faults += other.faults
    self.num_compared += other.num_compared
    self.num_different += other.num_different
    self.compare(name, other.answers)
    for case, took_s in other.took_s.items():
      self.took_s[f"{name}: {case}"] = took_s

  def write(self, path: pathlib.Path) -> None:
    """Writes the whole file or nothing."""
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != "on_change"
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    new.replace(path)

  @classmethod
  def read(cls, path: pathlib.Path) -> "CaseLog":
    """Reads what `write` wrote."""
    return cls(**json.loads(path.read_text(encoding="utf-8")))

  def _tell(self, before: Mapping[str, float | None]) -> None:
    print_progress("", before, self.took_s)
    if self.on_change is not None:
      self.on_change(self)


def print_progress(
  prefix: str,
  before: Mapping[str, float | None],
  now: Mapping[str, float | None],
) -> None:
  """Prints which cases began and ended.

  Args:
    prefix: What each line begins with.
    before: `took_s` of a log when it was looked at last.
    now: The same now.
  """
  for case, took_s in now.items():
    if case not in before:
      print(f"{prefix}{case} begins", flush=True)
    if took_s is not None and before.get(case) is None:
      print(f"{prefix}{case} took {took_s:.1f} s", flush=True)
