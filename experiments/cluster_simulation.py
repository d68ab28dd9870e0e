"""Compares policies by simulating clusters: who serves what, and how fast.

Managers and batchers are the real ones; the time of steps, of copies and of
messages comes from a model (`infinite_llm/simulator/cost_model.py`), so what
this tells of speed is an estimate.
"""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import ml_collections
from matplotlib import figure
from tqdm import tqdm

from experiments.report import table
from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.errors import ConfigError
from infinite_llm.simulator.cluster_config import ClusterConfig
from infinite_llm.simulator.cluster_simulator import ClusterSimulator
from infinite_llm.simulator.cost_model import CostModel, load_cost_model
from infinite_llm.simulator.traces import (
  TraceConfig,
  TraceRequest,
  draw_trace,
  load_trace,
)

_AIMS = {"instance_steps_per_s": 200.0, "times_real_time": 10.0}
"""What the simulator should reach on one core, at 32 instances."""

_POLICY = re.compile(r"(\w+?)(?:-on-(\d+))?(-without-dgfm)?")
"""Its name, devices of an instance, and whether circles of debts are left."""


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs every policy on every trace.

  Args:
    config: See `configs/cluster_simulation.py`.
    workdir: Gets `policies.png`.

  Returns:
    A row for each run, how fast they were simulated, and whether all rBlocks
    were given back in each that ended.
  """
  cost = load_cost_model(config.costs)
  traces = _traces(config)
  progress = tqdm(
    total=len(traces) * len(config.policies), desc="runs", leave=False
  )
  rows = []
  for name, trace in traces.items():
    for policy in config.policies:
      cluster, devices = _cluster(config, policy)
      run_of = _simulate(cluster, cost.sharded(devices), trace)
      rows.append({"trace": name, "policy": policy, **run_of})
      progress.update()
  progress.close()
  large = _run_large(config, cost)
  result = {
    "about": "seconds are the model's; cpu_s is processor time of the run",
    "costs": config.costs,
    "pool_tokens": _cluster(config, "static")[0].reachable_tokens,
    "runs": rows,
    "large": large,
    "aims": {
      name: {
        "at_least": aim,
        "all_runs_together": sum(row[name] * row["cpu_s"] for row in rows)
        / sum(row["cpu_s"] for row in rows),
        "slowest_run": min(row[name] for row in rows),
      }
      for name, aim in _AIMS.items()
    },
    "correct": all(
      row["num_blocks_leaked"] == 0 for row in (*rows, *filter(None, [large]))
    ),
  }
  print(_report(rows))
  if large:
    print(
      f"\n{large['num_instances']:,} instances, {large['policy']}:"
      f" {large['num_finished']:,} of {large['num_requests']:,} requests,"
      f" {large['duration_s']:,.0f} s in {large['cpu_s']:,.0f} s of one core."
    )
  _plot(rows, workdir / "policies.png")
  return result


def _traces(
  config: ml_collections.ConfigDict,
) -> dict[str, Sequence[TraceRequest]]:
  """The trace of the file, or one for each range of lengths."""
  trace = config.trace
  if trace.path:
    return {pathlib.Path(trace.path).name: load_trace(trace.path)}
  return {
    f"{low // 1000}-{high // 1000}K": _draw(
      trace, (low, high), trace.tokens_per_s, trace.arrive_s
    )
    for low, high in zip(trace.min_tokens, trace.max_tokens, strict=True)
  }


def _draw(
  trace: ml_collections.ConfigDict,
  lengths: tuple[int, int],
  tokens_per_s: float,
  arrive_s: float,
) -> Sequence[TraceRequest]:
  """Draws a trace that offers about so many tokens a second."""
  low, high = lengths
  if not 0 < low < high:
    raise ConfigError(f"min_tokens must be in (0, {high}); got {low}.")
  mean_tokens = (high - low) / math.log(high / low)  # Of a log-uniform length.
  requests_per_s = tokens_per_s / mean_tokens
  return draw_trace(
    TraceConfig(
      num_requests=max(round(requests_per_s * arrive_s), 1),
      requests_per_s=requests_per_s,
      min_tokens=low,
      max_tokens=high,
      min_output_tokens=trace.min_output_tokens,
      max_output_tokens=trace.max_output_tokens,
      seed=trace.seed,
    )
  )


def _cluster(
  config: ml_collections.ConfigDict, policy: str
) -> tuple[ClusterConfig, int]:
  """A cluster under a policy, and the devices of each of its instances."""
  match = _POLICY.fullmatch(policy)
  if match is None:
    raise ConfigError(
      "policies must be names, perhaps with -on-8 or -without-dgfm; got"
      f" {policy!r}."
    )
  name, devices = match[1], int(match[2] or 1)
  sizes = config.cluster.to_dict()
  if devices < 1 or sizes["num_instances"] % devices:
    raise ConfigError(
      f"policies must be on a divisor of num_instances = devices"
      f" ({sizes['num_instances']}); got {policy!r}."
    )
  sizes["num_instances"] //= devices
  for tier in ("num_blocks", "host_blocks"):
    if sizes[tier]:
      sizes[tier] = 1 + devices * (sizes[tier] - 1)
  rows = devices * config.scheduler.max_num_seqs
  cluster = ClusterConfig(
    lending=LendingConfig(policy=name, **config.lending),
    scheduler=SchedulerConfig(
      max_num_seqs=rows,
      decode_buckets=(rows,),
      prefill_buckets=tuple(config.scheduler.prefill_buckets),
    ),
    has_dgfm=match[3] is None,
    seed=config.seed,
    **sizes,
  )
  return cluster, devices


def _run_large(
  config: ml_collections.ConfigDict, cost: CostModel
) -> dict[str, Any] | None:
  large = config.large
  if not large.num_instances:
    return None
  base, devices = _cluster(config, large.policy)
  cluster = dataclasses.replace(
    base,
    num_instances=large.num_instances // devices,
    lending=dataclasses.replace(
      base.lending, heartbeat_every_s=large.heartbeat_every_s
    ),
  )
  lengths = large.min_tokens, large.max_tokens
  trace = _draw(config.trace, lengths, large.tokens_per_s, large.arrive_s)
  return {
    "num_instances": large.num_instances,
    "policy": large.policy,
    **_simulate(cluster, cost.sharded(devices), trace),
  }


def _simulate(
  cluster: ClusterConfig, cost: CostModel, trace: Sequence[TraceRequest]
) -> dict[str, Any]:
  """Runs one cluster; `cpu_s` has the time of its making in it."""
  started = time.process_time()
  result = ClusterSimulator(cluster, cost, trace).run()
  cpu_s = time.process_time() - started
  return {
    **result.summary(),
    "offered_tokens": sum(r.prompt_tokens + r.output_tokens for r in trace),
    "cpu_s": cpu_s,
    "instance_steps_per_s": result.instance_steps / cpu_s,
    "times_real_time": result.duration_s / cpu_s,
  }


def _report(rows: Sequence[Mapping[str, Any]]) -> str:
  """A table for terminals."""
  columns = {
    "done": "num_finished",
    "of": "num_requests",
    "s": "duration_s",
    "output tok/s": "output_tokens_per_s",
    "all tok/s": "served_tokens_per_s",
    "longest": "longest_context_tokens",
    "first s": "first_token_median_s",
    "whole s": "latency_median_s",
    "whole p99": "latency_p99_s",
    "moved": "num_blocks_moved",
    "preempted": "num_preempted",
    "x real time": "times_real_time",
  }
  return table(
    "Policies on simulated clusters",
    ["trace, policy", *columns],
    [
      [f"{row['trace']} {row['policy']}", *(row[c] for c in columns.values())]
      for row in rows
    ],
  )


_PANELS = {
  "served_tokens_per_s": "tokens/s of finished requests",
  "longest_context_tokens": "longest context served, tokens",
  "latency_median_s": "latency of finished requests, median, s",
  "remote_share": "share of rBlocks that are lent",
}


def _plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Bars: one panel a figure, one group a trace, one colour a policy."""
  matplotlib.use("agg")
  traces = list(dict.fromkeys(row["trace"] for row in rows))
  policies = list(dict.fromkeys(row["policy"] for row in rows))
  value_of = {(row["trace"], row["policy"]): row for row in rows}
  canvas = figure.Figure(figsize=(11, 7), layout="constrained")
  width = 0.8 / len(policies)
  for axes, (name, label) in zip(
    canvas.subplots(2, 2).flat, _PANELS.items(), strict=True
  ):
    for number, policy in enumerate(policies):
      axes.bar(
        [place + number * width for place in range(len(traces))],
        [value_of[trace, policy][name] or 0 for trace in traces],
        width,
        label=policy,
      )
    axes.set_xticks(
      [place + 0.4 - width / 2 for place in range(len(traces))], traces
    )
    axes.set_title(label, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
  canvas.axes[0].legend(fontsize=8)
  canvas.supxlabel("context lengths of the trace")
  canvas.savefig(path, dpi=120)
