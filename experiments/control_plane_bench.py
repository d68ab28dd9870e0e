"""Times the control plane on one CPU core: steps, heartbeats and plans.

Clusters are drawn: some instances are filled by one long request while others
wait, the rest run many short ones and have room, and all have debts, some of
them in circles. Managers are the real ones; messages are handed over directly.
Time is the processor's, so that what else runs on the machine counts less.
"""

import gc
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import ml_collections
import numpy as np
from matplotlib import figure
from tqdm import tqdm

from experiments.drawn_cluster import draw_heartbeats, is_sound
from experiments.report import table
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import GMANAGER, Envelope, Heartbeat
from infinite_llm.scheduler.performance_model import load_performance_model
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.scheduler.request import Request
from infinite_llm.scheduler.rmanager import RManager

_AIMS_MS = {"step_ms": 1.0, "planning_round_ms": 100.0}
"""What one scheduling decision and a whole planning round should stay below."""

_ALLOCATED_BLOCKS = 16
"""rBlocks of each timed allocation: a prefill chunk of 1,024 tokens."""

_PERIOD_S = 0.125  # Sums of it are exact.
_PLAN_PERIOD_S = 1.0


class _Clock:
  """Goes on when told to."""

  now_s = 0.0

  def __call__(self) -> float:
    return self.now_s


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Times everything at every size.

  Args:
    config: See `configs/control_plane_bench.py`.
    workdir: Gets `curve.png`.

  Returns:
    One row for each number of instances, the time of a step, and how times grow
    with the instances. Times are the median and the best of all repetitions.
  """
  step, lockstep = (_time_step(config, is_staggered=s) for s in (True, False))
  rows = [
    _time_cluster(config, num_instances)
    for num_instances in tqdm(
      config.cluster.num_instances, desc="clusters", leave=False
    )
  ]
  result = {
    "clock": "processor time of the process (time.process_time)",
    "step": step,
    "lockstep": lockstep,
    "clusters": rows,
    "growth_exponents": _growth(rows),
    "aims": {
      "step_ms": {"below": _AIMS_MS["step_ms"], "is": step["step_ms"]},
      "planning_round_ms": {
        "below": _AIMS_MS["planning_round_ms"],
        "is": rows[-1]["planning_round_ms"],
        "num_instances": rows[-1]["num_instances"],
      },
    },
    "correct": all(row["is_plan_sound"] for row in rows),
  }
  print(_report(result))
  _plot(rows, workdir / "curve.png")
  return result


def _time_step(
  config: ml_collections.ConfigDict, *, is_staggered: bool
) -> dict[str, Any]:
  """Times the decisions of steps in which all rows decode, others waiting.

  Args:
    config: See `configs/control_plane_bench.py`.
    is_staggered: Whether requests are of different lengths, so that in each
      step a few of them need an rBlock; if not, all need one in the same step.

  Returns:
    Times of planning, and of noting what a step proved.
  """
  block_size = config.cluster.block_size
  num_rows, num_waiting = config.step.rows, config.step.waiting
  longest = config.step.prompt_tokens + block_size
  max_tokens = longest + config.step.steps + 1
  lending = LendingConfig()
  rmanager = RManager(
    instance=0,
    num_instances=1,
    pool=BlockPool(0, 2 + num_rows * (max_tokens // block_size + 1)),
    block_size=block_size,
    lending=lending,
    clock=_Clock(),
  )
  scheduler = SchedulerConfig(
    max_num_seqs=num_rows,
    decode_buckets=(num_rows,),
    prefill_buckets=(num_rows * longest,),
    prefill_rows=num_rows,
  )
  batcher = Batcher(rmanager, scheduler, lending, block_size)
  requests: dict[int, Request] = {}
  for uid in range(1, num_rows + num_waiting + 1):
    extra = uid % block_size if is_staggered else 0
    requests[uid] = Request(
      uid=uid,
      request_id=f"request-{uid}",
      prompt_token_ids=tuple(range(config.step.prompt_tokens + extra)),
      sampling=SamplingParams(max_tokens=config.step.steps + 1),
      arrival=uid,
      max_total_tokens=max_tokens,
    )
    batcher.add(requests[uid])
  plans_s, advances_s = [], []
  gc.collect()
  for _ in range(config.step.steps + 1):
    started = time.process_time()
    plan = batcher.plan()
    planned = time.process_time()
    for row in plan.rows:
      batcher.advance(row)
    plans_s.append(planned - started)
    advances_s.append(time.process_time() - planned)
    for row in plan.rows:
      requests[row.uid].output_token_ids.append(0)
  # The first step is the prefill of all of them.
  return {
    "rows": len(plan.local_decode),
    "num_waiting": len(batcher.waiting),
    **_milliseconds("step", plans_s[1:]),
    "step_p99_ms": float(np.percentile(plans_s[1:], 99)) * 1e3,
    "step_max_ms": max(plans_s[1:]) * 1e3,
    **_milliseconds("advance", advances_s[1:]),
  }


def _time_cluster(
  config: ml_collections.ConfigDict, num_instances: int
) -> dict[str, Any]:
  """Times managers and plans of one cluster."""
  row: dict[str, Any] = {
    "num_instances": num_instances,
    "blocks_per_instance": config.cluster.num_blocks // num_instances,
  }
  row |= _time_planning(config, num_instances)
  row |= _time_managers(config, num_instances)
  return row


def _time_planning(
  config: ml_collections.ConfigDict, num_instances: int
) -> dict[str, Any]:
  """Times what a gManager does with the heartbeats of a drawn cluster."""
  clock = _Clock()
  planning = PlanningConfig(
    block_size=config.cluster.block_size,
    performance=load_performance_model(config.performance),
    max_moves=num_instances,
    max_circles=num_instances,
  )
  lending = LendingConfig(
    policy="greedy",
    heartbeat_every_s=_PERIOD_S,
    plan_every_s=_PLAN_PERIOD_S,
    expire_after_s=1e9,
  )
  gmanager = GManager(lending, clock, planning=planning)
  for instance, heartbeat in enumerate(draw_heartbeats(config, num_instances)):
    gmanager.on_message(_envelope(instance, heartbeat))
  gmanager.drain_messages()
  policy = get_policy("greedy")
  view = gmanager.view()
  moves = policy.plan_moves(view, planning)
  recalls = policy.plan_recalls(view, planning)

  def plan_round() -> None:
    clock.now_s += _PLAN_PERIOD_S
    gmanager.tick()
    gmanager.drain_messages()

  def repeat(do: Callable[[], object]) -> list[float]:
    return _repeat(do, config.repeats)

  def rank() -> object:
    return policy.rank_creditors(view, planning, num_instances // 2, 16)

  return {
    "num_requests": len(view.placements),
    "num_moves": len(moves),
    "num_recalls": len(recalls),
    "is_plan_sound": is_sound(view, moves, recalls),
    **_milliseconds("view", repeat(gmanager.view)),
    **_milliseconds(
      "plan_moves", repeat(lambda: policy.plan_moves(view, planning))
    ),
    **_milliseconds(
      "plan_recalls", repeat(lambda: policy.plan_recalls(view, planning))
    ),
    **_milliseconds("planning_round", repeat(plan_round)),
    **_milliseconds("rank_creditors", repeat(rank)),
  }


def _time_managers(
  config: ml_collections.ConfigDict, num_instances: int
) -> dict[str, Any]:
  """Times real rManagers: allocation, and heartbeats to a gManager and back."""
  clock = _Clock()
  lending = LendingConfig(
    heartbeat_every_s=_PERIOD_S,
    full_heartbeat_every=10**9,
    plan_every_s=1e9,
    expire_after_s=1e9,
  )
  num_blocks = config.cluster.num_blocks // num_instances
  managers = [
    RManager(
      instance=instance,
      num_instances=num_instances,
      pool=BlockPool(instance, num_blocks + 1),
      block_size=config.cluster.block_size,
      lending=lending,
      clock=clock,
    )
    for instance in range(num_instances)
  ]
  size = max(
    int(config.cluster.fill * num_blocks) // config.cluster.requests, 1
  )
  first_uids = []
  for manager in managers:
    first_uids.append(1 + manager.instance * config.cluster.requests)
    for uid in range(first_uids[-1], first_uids[-1] + config.cluster.requests):
      manager.open(uid)
      manager.allocate(uid, size)
      manager.confirm(uid, size * config.cluster.block_size)
  gmanager = GManager(lending, clock)

  def heartbeat_round() -> None:
    clock.now_s += _PERIOD_S
    for manager in managers:
      manager.tick()
      for envelope in manager.drain_messages():
        gmanager.on_message(envelope)
    for envelope in gmanager.drain_messages():
      managers[envelope.receiver].on_message(envelope)

  def grow() -> None:
    """One request of each instance has changed since the last heartbeat."""
    for manager, uid in zip(managers, first_uids, strict=True):
      manager.allocate(uid, 1)

  first_s = _repeat(heartbeat_round, 1)
  rounds_s = _repeat(heartbeat_round, config.repeats, before=grow)
  count = max(num_blocks // 2 // _ALLOCATED_BLOCKS, 1)
  uid = 1 + num_instances * config.cluster.requests

  def allocate_and_free() -> None:
    managers[0].open(uid)
    for _ in range(count):
      managers[0].allocate(uid, _ALLOCATED_BLOCKS)
    managers[0].close(uid)

  allocated = count * _ALLOCATED_BLOCKS
  per_block_us = [
    elapsed / allocated * 1e6
    for elapsed in _repeat(allocate_and_free, config.repeats)
  ]
  return {
    "first_heartbeat_round_ms": first_s[0] * 1e3,
    **_milliseconds("heartbeat_round", rounds_s),
    "allocate_and_free_us_per_block": statistics.median(per_block_us),
  }


def _envelope(instance: int, heartbeat: Heartbeat) -> Envelope:
  return Envelope(
    sender=instance, receiver=GMANAGER, incarnation=1, seq=1, body=heartbeat
  )


def _repeat(
  do: Callable[[], object],
  repeats: int,
  before: Callable[[], object] = lambda: None,
) -> list[float]:
  """Processor seconds of each repetition, without what comes before it.

  What exists by now is not garbage: the collector is not to look through it
  again and again, as it would not in a server that froze it after start-up.
  """
  gc.collect()
  gc.freeze()
  times_s = []
  for _ in range(repeats):
    before()
    started = time.process_time()
    do()
    times_s.append(time.process_time() - started)
  gc.unfreeze()
  return times_s


def _milliseconds(name: str, times_s: list[float]) -> dict[str, float]:
  return {
    f"{name}_ms": statistics.median(times_s) * 1e3,
    f"{name}_best_ms": min(times_s) * 1e3,
  }


_CURVES = {
  "planning_round_ms": "planning round",
  "plan_moves_ms": "plan_moves (greedy)",
  "plan_recalls_ms": "plan_recalls (DGFM)",
  "heartbeat_round_ms": "heartbeat round",
}


def _growth(rows: list[dict[str, Any]]) -> dict[str, float]:
  """Exponents `a` of times that grow as `num_instances ** a`."""
  if len(rows) < 2:
    return {}
  sizes = np.log([row["num_instances"] for row in rows])
  return {
    name: float(np.polyfit(sizes, np.log([row[name] for row in rows]), 1)[0])
    for name in _CURVES
  }


def _report(result: Mapping[str, Any]) -> str:
  """Tables for terminals."""
  names = ["allocate_and_free_us_per_block", "rank_creditors_ms", *_CURVES]
  clusters = table(
    "Control plane, CPU ms (median)",
    ["instances", "moves", "recalls", *(n.removesuffix("_ms") for n in names)],
    [
      [
        str(row["num_instances"]),
        row["num_moves"],
        row["num_recalls"],
        *(f"{row[name]:.2f}" for name in names),
      ]
      for row in result["clusters"]
    ],
  )
  step = result["step"]
  return (
    f"{clusters}\n\nA step of {step['rows']} rows is planned in"
    f" {step['step_ms']:.2f} ms (p99 {step['step_p99_ms']:.2f}) while"
    f" {step['num_waiting']} requests wait; one in which all need an rBlock in"
    f" {result['lockstep']['step_max_ms']:.2f} ms."
  )


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Times against the number of instances, beside a straight line."""
  matplotlib.use("agg")
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  sizes = [row["num_instances"] for row in rows]
  for name, label in _CURVES.items():
    axes.plot(sizes, [row[name] for row in rows], "o-", label=label)
  last = rows[-1]
  per_instance = last["planning_round_ms"] / last["num_instances"]
  straight = [per_instance * n for n in sizes]
  axes.plot(sizes, straight, "k:", label="in proportion")
  axes.axhline(_AIMS_MS["planning_round_ms"], color="grey", lw=1, label="aim")
  axes.set_xscale("log", base=2)
  axes.set(yscale="log", xlabel="instances", ylabel="CPU ms")
  axes.set_title("Control plane, one CPU core, one million rBlocks")
  axes.grid(alpha=0.3)
  axes.legend()
  canvas.savefig(path, dpi=150)
