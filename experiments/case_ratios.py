"""Cases of the same load in terms of each other, and their tables."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.report import table

_AIM = "within 2 %"
_RATIOS = (
  ("separate", "alone", None),
  ("sharing", "separate", _AIM),
  ("sharing", "alone", _AIM),
  ("spilling, prefill", "sharing", None),
  ("spilling, decode", "sharing", None),
)

_Row = dict[str, Any]


def case_ratios(rows: Sequence[_Row]) -> list[_Row]:
  """Each case in terms of another, for each instance.

  Args:
    rows: As `experiments/case_runner.py` makes them.

  Returns:
    A row for each instance and pair of cases. More than 1 is more tokens a
    second, or more time between two tokens.
  """
  found = {(row["case"], row["instance"]): row for row in rows}
  ratios = []
  for case, other, aim in _RATIOS:
    for instance in sorted({row["instance"] for row in rows}):
      one, two = found.get((case, instance)), found.get((other, instance))
      if one is None or two is None:
        continue
      ratios.append(
        {
          "case": case,
          "to": other,
          "instance": instance,
          "load": one["load"],
          "tokens_per_s": _ratio(
            *(
              statistics.median(row["tokens_per_s_of_runs"])
              for row in (one, two)
            )
          ),
          "itl": _ratio(one["itl_ms"], two["itl_ms"]),
          "itl_p99": _ratio(one["itl_p99_ms"], two["itl_p99_ms"]),
          "aim": aim,
        }
      )
  return ratios


def _ratio(one: float | None, two: float | None) -> float | None:
  return one / two if one is not None and two else None


def cases_report(rows: Sequence[_Row], ratios: Sequence[_Row]) -> str:
  """Both as tables.

  Args:
    rows: As `experiments/case_runner.py` makes them.
    ratios: What `case_ratios` made of them.
  """
  seen = table(
    "What each instance saw",
    [
      "case",
      "instance",
      "prompt tokens/s",
      "output tokens/s",
      "ITL, ms",
      "p99",
    ],
    [
      [
        row["case"],
        row["instance"],
        row["prompt_tokens_per_s"],
        row["output_tokens_per_s"],
        row["itl_ms"],
        row["itl_p99_ms"],
      ]
      for row in rows
    ],
  )
  compared = table(
    "One case as a part of another",
    ["cases", "instance", "tokens/s", "ITL", "p99", "aim"],
    [
      [
        f"{ratio['case']} / {ratio['to']}",
        ratio["instance"],
        *(
          value and f"{value:.3f}"
          for value in (ratio["tokens_per_s"], ratio["itl"], ratio["itl_p99"])
        ),
        ratio["aim"],
      ]
      for ratio in ratios
    ],
  )
  return f"{seen}\n\n{compared}"
