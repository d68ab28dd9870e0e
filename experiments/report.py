"""Tables in plain text, for terminals."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(
  title: str, header: Sequence[str], rows: Sequence[Sequence[object]]
) -> str:
  """Lays out a table: the first column to the left, all others to the right.

  Args:
    title: What stands above it.
    header: Names of the columns.
    rows: Cells; integers get separators, floats one decimal, None a dash.

  Returns:
    Lines without a newline at the end.
  """
  cells = [list(header), *([_cell(value) for value in row] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

  def line(row: Sequence[str]) -> str:
    first, *others = row
    parts = [first.ljust(widths[0])]
    parts += [
      cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)
    ]
    return "  ".join(parts).rstrip()

  rule = "  ".join("-" * width for width in widths)
  return "\n".join([title, line(cells[0]), rule, *map(line, cells[1:])])


def serving_report(result: Mapping[str, Any]) -> str:
  """Describes a run of the quickstart: who lent what, how fast, what came out.

  Args:
    result: What `experiments.quickstart` returns.

  Returns:
    Three tables and a few lines.
  """
  names = [f"instance {n}" for n in range(result["num_instances"])]
  lent = table(
    "rBlocks lent, at the most (rows lend to columns)",
    ["", *names],
    [
      [name, *(count or None for count in counts)]
      for name, counts in zip(names, result["blocks_lent_by_to"], strict=True)
    ],
  )
  use = table(
    f"Use of each instance ({result['blocks_per_instance']:,} rBlocks of"
    f" {result['block_size']} tokens)",
    [
      "",
      "requests",
      "prompt tokens",
      "output tokens",
      "tokens/s",
      "own rBlocks, peak",
      "hosted, peak",
    ],
    [
      [
        name,
        use["requests"],
        use["prompt_tokens"],
        use["output_tokens"],
        (use["prompt_tokens"] + use["output_tokens"]) / result["serve_s"],
        use["peak_own"],
        use["peak_hosted"],
      ]
      for name, use in zip(names, result["instances"], strict=True)
    ],
  )
  speed = table(
    "Speed",
    ["", ""],
    [
      ["document, prompt tokens/s", result["prefill_tokens_per_s"]],
      ["its answer, tokens/s", result["decode_tokens_per_s"]],
      ["loading and compiling, s", result["warm_up_s"]],
      ["serving, s", result["serve_s"]],
    ],
  )
  return "\n\n".join([lent, use, speed, "\n".join(_verdict(result))])


def _verdict(result: Mapping[str, Any]) -> list[str]:
  tokens = result["context_tokens"]
  capacity = result["capacity_tokens_per_instance"]
  lines = [
    f"A context of {tokens:,} tokens, {tokens / capacity:.1f} times what an"
    f" instance holds, over {1 + len(result['creditors'])} instance(s).",
    f"Asked for {', '.join(result['expected'])}.",
    f"Answered  {', '.join(result['answer']) or 'nothing'}:"
    f" {'right' if result['correct'] else 'WRONG'}.",
    f"Short requests meanwhile: {result['short_requests_right']} of"
    f" {result['num_short_requests']} right.",
  ]
  if result["error"]:
    lines.append(f"The long request ended for an error: {result['error']}")
  if result["blocks_leaked"]:
    lines.append(f"{result['blocks_leaked']} rBlocks were not given back.")
  return lines


def _cell(value: object) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:,.1f}"
  if isinstance(value, int):
    return f"{value:,}"
  return str(value)
