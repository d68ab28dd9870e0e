"""How fast rBlocks move, and attention over them, on the GPUs of one host.

HBM to host memory and back, instance to instance, decode steps beside both, a
request larger than HBM, and one long request's attention spread over instances
in three ways. It runs on
one, two or four GPUs; what needs more than there are is left out, and named:

    python -m experiments.run --config=configs/data_plane_bench.py
      --workdir=runs/data_plane_bench
"""

import functools
import gc
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import ml_collections
from matplotlib import figure

from experiments import (
  attention_bench,
  collective_bench,
  exchange_bench,
  host_attention_bench,
  host_read_bench,
  link_bench,
  tier_bench,
)
from experiments.report import table
from experiments.run_facts import run_facts
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.errors import ConfigError

_SHOWN = (
  "gb_per_s",
  "tb_per_s",
  "layer_us",
  "call_us",
  "speedup",
  "slowdown",
  "share",
)

_Row = dict[str, Any]


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs every part that the devices allow.

  Args:
    config: See `configs/data_plane_bench.py`.
    workdir: Gets `rows.json`, written anew after each row, and the plots.

  Returns:
    `rows`, what was `left_out`, and whether what was checked is `correct`.

  Raises:
    ConfigError: If there is not what the configuration names.
  """
  num_devices = _devices(config)
  attention_bench.check_ways(config)
  about = run_facts(num_devices)
  rows: list[_Row] = []
  left_out: list[str] = []
  parts: list[tuple[str, bool, Callable[[], Iterable[_Row]], int]] = [
    (
      "tiers",
      config.tiers.run,
      functools.partial(tier_bench.bench, config, num_devices),
      1,
    ),
    (
      "links",
      config.links.run,
      functools.partial(link_bench.bench, config, num_devices),
      1,
    ),
    (
      "host reads",
      config.host_reads.run,
      functools.partial(host_read_bench.bench, config),
      1,
    ),
    (
      "host attention",
      config.host_attention.run,
      functools.partial(host_attention_bench.bench, config),
      1,
    ),
    (
      "exchange",
      config.exchange.run,
      functools.partial(exchange_bench.bench, config, num_devices),
      2,
    ),
    (
      "collectives",
      config.collectives.run,
      functools.partial(collective_bench.bench, config, num_devices),
      2,
    ),
    (
      "attention",
      config.attention.run,
      functools.partial(attention_bench.bench, config, num_devices),
      1,
    ),
  ]
  for name, is_wanted, bench, needed in parts:
    if not is_wanted:
      continue
    if num_devices < needed:
      left_out.append(f"{name}: needs {needed} devices of {num_devices}")
      continue
    for row in bench():
      rows.append({**row, **about})
      _show(row)
      text = json.dumps(rows, indent=1) + "\n"
      (workdir / "rows.json").write_text(text, encoding="utf-8")
    # Pools and programs of a part leave the devices to the next one.
    gc.collect()
    jax.clear_caches()
  left_out += [
    f"attention over {count} instances: {num_devices} devices"
    for count in config.attention.num_instances
    if config.attention.run and count > num_devices
  ]
  matplotlib.use("agg")
  _plot_tiers(rows, workdir / "tiers.png")
  _plot_attention(rows, workdir / "attention.png")
  print(_summary(rows))
  return {
    "rows": rows,
    "left_out": left_out,
    "correct": all(row.get("correct", True) for row in rows),
  }


def _devices(config: ml_collections.ConfigDict) -> int:
  """Takes the platform that is asked for; how many devices to use."""
  choose_platform(config.platform)
  check_platform(config.platform)
  found = jax.device_count()
  if not 0 <= config.num_devices <= found:
    raise ConfigError(
      f"num_devices must be in [0, {found}]; got {config.num_devices}."
    )
  return config.num_devices or found


def _show(row: _Row) -> None:
  """Prints what a row says, in one line."""
  hidden = ("aim", "block_bytes")
  parts = (
    f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
    for name, value in row.items()
    if name not in hidden and value is not None
  )
  print(" ".join(parts), flush=True)


def _summary(rows: Sequence[_Row]) -> str:
  """Rows that have an aim, beside it."""
  lines = []
  for row in rows:
    if "aim" in row:
      what = [
        str(row[name])
        for name in (
          "part",
          "way",
          "to",
          "context",
          "bytes",
          "blocks",
          "instances",
        )
        if name in row
      ]
      shown = next(
        name for name in reversed(_SHOWN) if row.get(name) is not None
      )
      lines.append([" ".join(what), f"{row[shown]:.3g}", shown, row["aim"]])
  return table("Data plane", ["case", "is", "of", "aim"], lines)


def _plot_tiers(rows: Sequence[_Row], path: pathlib.Path) -> None:
  """GB/s against the number of rBlocks moved at once."""
  moves = [row for row in rows if row["part"] == "tier moves"]
  moves = [row for row in moves if row["instances"] == 1]
  if not moves:
    return
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  for way, to_tier in dict.fromkeys((row["way"], row["to"]) for row in moves):
    line = [
      (row["blocks"], row["gb_per_s"])
      for row in moves
      if (row["way"], row["to"]) == (way, to_tier)
    ]
    axes.plot(*zip(*line, strict=True), "o-", label=f"{way}, to {to_tier}")
  _label(axes, "rBlocks moved at once", "GB/s")
  axes.set_title(f"HBM and host memory, {moves[0]['device']}")
  canvas.savefig(path, dpi=150)


def _plot_attention(rows: Sequence[_Row], path: pathlib.Path) -> None:
  """Time of a layer against the context, for each way."""
  timed = [row for row in rows if "layer_us" in row]
  if not timed:
    return
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  for way, count in dict.fromkeys((r["way"], r["instances"]) for r in timed):
    line = sorted(
      (row["context"], row["layer_us"])
      for row in timed
      if (row["way"], row["instances"]) == (way, count)
    )
    axes.plot(*zip(*line, strict=True), "o-", label=f"{way}, {count}")
  axes.set_yscale("log")
  _label(axes, "context, tokens", "decode attention of one layer, us")
  axes.set_title(f"One request on several devices, {timed[0]['device']}")
  canvas.savefig(path, dpi=150)


def _label(axes: Any, x: str, y: str) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.3)
  axes.legend()
