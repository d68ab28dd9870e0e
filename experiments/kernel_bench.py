"""Kernels on one GPU: right first, then timed, beside their peers.

Times are the device's. Of decode kernels the profiler tells them; of others
they are the slope over how often one program calls them, so that neither the
host nor the launch of the program is in it. What all layers of a model share,
such as the cut of the work, is not in it either.
"""

import datetime
import importlib.metadata
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib
import ml_collections
from matplotlib import figure

from experiments import (
  choice_bench,
  conformance_bench,
  copy_bench,
  decode_bench,
  prefill_bench,
)
from experiments.kernel_timing import slope_us
from infinite_llm.errors import ConfigError


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Mapping:
  """Times every case; writes `rows.json` and the plot.

  Args:
    config: See `configs/kernel_bench.py`.
    workdir: Where the files go.

  Returns:
    `rows`, one a kernel and case, and whether all were `correct`.
  """
  if jax.default_backend() != "gpu":
    raise ConfigError(
      f"kernel_bench must run on a GPU; got {jax.default_backend()}."
    )
  anchors = json.loads(pathlib.Path(config.anchors).read_text("utf-8"))
  about = _about()
  rows: list[dict[str, Any]] = []
  for part, bench in (
    (config.conformance, lambda: conformance_bench.bench(config)),
    (config.decode, lambda: decode_bench.bench(config, anchors)),
    (config.prefill, lambda: prefill_bench.bench(config, anchors, slope_us)),
    (config.copies, lambda: copy_bench.bench(config, anchors, slope_us)),
    (config.choice, lambda: choice_bench.bench(config)),
  ):
    for row in bench() if part.run else ():
      rows.append({**row, **about})
      _write(workdir / "rows.json", rows)
  if config.decode.run:
    _plot(config, rows, workdir / "decode.png")
  correct = all(row["correct"] is not False for row in rows)
  return {"rows": rows, "correct": correct}


def _about() -> dict[str, Any]:
  """What every row tells of its run."""
  packages = ("jax", "jaxlib", "jax-cuda13-plugin")
  command = ["python", "-m", "experiments.run", *sys.argv[1:]]
  return {
    "device": jax.devices()[0].device_kind,
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "command": shlex.join(command),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _plot(
  config: ml_collections.ConfigDict,
  rows: list[dict[str, Any]],
  path: pathlib.Path,
) -> None:
  """Achieved bandwidth against context length, peers beside it."""
  matplotlib.use("agg")
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  cases = [row for row in rows if row["kernel"] == "decode"]
  # As much KV in each; what is smaller is slower for that reason alone.
  cases = [
    row
    for row in cases
    if re.fullmatch(r"\d+x\d+ 32/8", row["case"])
    and math.prod(map(int, re.findall(r"\d+", row["case"])[:2]))
    == config.decode.sweep_tokens
  ]
  for name in dict.fromkeys(row["implementation"] for row in cases):
    line = sorted(
      (row["context"], row["tb_per_s"])
      for row in cases
      if row["implementation"] == name
    )
    axes.plot(*zip(*line, strict=True), "o-", label=name)
  for peer in dict.fromkeys(row["peer"] for row in cases if row["peer"]):
    points = {
      (row["context"], row["kv_bytes"] / row["peer_us"] / 1e6)
      for row in cases
      if row["peer"] == peer
    }
    axes.plot(*zip(*sorted(points), strict=True), "x--", label=peer)
  axes.set_xscale("log", base=2)
  axes.set_ylim(bottom=0)
  axes.set_xlabel("context, tokens per row")
  axes.set_ylabel("KV read, TB/s")
  tokens = f"{config.decode.sweep_tokens:,} tokens of KV"
  axes.set_title(f"Decode, 32 query and 8 KV heads, {tokens}")
  axes.grid(alpha=0.3)
  axes.legend()
  canvas.savefig(path, dpi=150)
