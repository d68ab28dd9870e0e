"""Looks for violations in simulated clusters, one seed after another."""

import collections
import dataclasses
import gc
import math
import os
import pathlib
import random
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import ml_collections
import tqdm

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.messages import Address, Envelope
from infinite_llm.simulator.fault_simulation import SeedResult, run_seed
from infinite_llm.simulator.scenario import (
  Scenario,
  draw_scenario,
  with_all_troubles,
)

_SUMS = (
  "num_events",
  "num_sent",
  "num_delivered",
  "num_requests",
  "num_failed",
  "num_rows",
  "num_unproved",
  "num_tokens",
  "num_migrated",
  "num_moved",
  "num_swapped",
  "num_takeovers",
  "num_deaths",
  "time_s",
)


_EVENT = (
  "A message event is the sending of a message, or what became of one copy of"
  " it: delivered, lost, cut off by a partition, or unheard at a crashed"
  " address. Ticks, steps, payloads and copies are none. The rate is per second"
  " of processor time (time.process_time), for the machine is shared."
)


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs the experiment.

  Args:
    config: As `configs/fault_simulation.py` makes it.
    workdir: Gets the trace of a replayed seed.

  Returns:
    What happened, and whether all of it was right.

  Raises:
    ConfigError: If a number makes no sense.
  """
  _check(config)
  if config.seed >= 0:
    return _replay(config, workdir)
  first, last = config.first_seed, config.first_seed + config.num_seeds
  # What exists by now is no garbage, and is not to be looked through.
  gc.collect()
  gc.freeze()
  started_s, started_cpu_s = time.perf_counter(), time.process_time()
  totals: collections.Counter[str] = collections.Counter()
  events: collections.Counter[str] = collections.Counter()
  kinds: collections.Counter[str] = collections.Counter()
  faults: collections.Counter[str] = collections.Counter()
  troubles: collections.Counter[str] = collections.Counter()
  plans_followed: collections.Counter[str] = collections.Counter()
  unheeded: collections.Counter[str] = collections.Counter()
  longest_takeover_s = 0.0
  fewest = dict.fromkeys(
    ("num_events", "num_delivered", "num_faults"), sys.maxsize
  )
  violations: list[dict[str, Any]] = []
  with tqdm.tqdm(range(first, last), unit="seed", disable=None) as seeds:
    for seed in seeds:
      result = run_seed(seed, scenario=_scenario(seed, config))
      totals.update({name: getattr(result, name) for name in _SUMS})
      events.update(result.events)
      kinds.update(result.kinds)
      longest_takeover_s = max(longest_takeover_s, result.longest_takeover_s)
      faults.update(result.faults)
      troubles.update(result.troubles)
      plans_followed.update(result.plans_followed)
      unheeded.update(result.unheeded)
      for name in fewest:
        fewest[name] = min(fewest[name], getattr(result, name))
      if result.violation is not None:
        violations.append(_report(result, config))
  wall_s = time.perf_counter() - started_s
  cpu_s = time.process_time() - started_cpu_s
  gc.unfreeze()
  summary = {
    "correct": not violations,
    "num_seeds": config.num_seeds,
    "num_violations": len(violations),
    "violations": violations,
    "message_events_per_s": totals["num_events"] / cpu_s,
    "wall_s": wall_s,
    "cpu_s": cpu_s,
    "load_average": os.getloadavg(),
    "message_event": _EVENT,
    "totals": dict(totals),
    "longest_takeover_s": longest_takeover_s,
    "fewest_of_a_seed": fewest,
    "message_events": dict(events),
    "messages_sent": dict(sorted(kinds.items())),
    "faults": dict(sorted(faults.items())),
    "troubles": dict(sorted(troubles.items())),
    "plans_followed": dict(sorted(plans_followed.items())),
    "unheeded": dict(sorted(unheeded.items())),
  }
  _print(summary)
  return summary


def _check(config: ml_collections.ConfigDict) -> None:
  for name, least in (
    ("num_seeds", 1),
    ("first_seed", 0),
    ("seed", -1),
    ("num_instances", 0),
    ("min_messages", 1),
    ("min_faults", 1),
  ):
    if config[name] < least:
      raise ConfigError(f"{name} must be at least {least}; got {config[name]}.")
  if config.num_instances == 1:
    raise ConfigError("num_instances must be 0 or at least 2; got 1.")


def _scenario(seed: int, config: ml_collections.ConfigDict) -> Scenario:
  scenario = dataclasses.replace(
    draw_scenario(random.Random(seed)),
    min_messages=config.min_messages,
    min_faults=config.min_faults,
  )
  if not config.num_instances:
    return scenario
  # As much happens to each instance, however many there are.
  share = scenario.num_instances / config.num_instances
  return dataclasses.replace(
    with_all_troubles(scenario),
    num_instances=config.num_instances,
    request_every_s=scenario.request_every_s * share,
    most_open=math.ceil(scenario.most_open / share),
    trouble_every_s=scenario.trouble_every_s * share,
    plan_every_s=scenario.plan_every_s * share,
  )


def _replay(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs one seed and writes all that happened."""
  path = workdir / "trace.txt"
  with path.open("w", encoding="utf-8") as file:
    trace = _Trace(file)
    result = run_seed(
      config.seed,
      scenario=_scenario(config.seed, config),
      observer=trace.on_message,
      note=trace.on_note,
    )
    trace.on_note(result.time_s, result.violation or "all was right")
  print(f"seed {config.seed}: {result.violation or 'all was right'}")
  print(f"trace: {path}")
  return {
    "correct": result.violation is None,
    "seed": result.seed,
    "violation": result.violation,
    "totals": {name: getattr(result, name) for name in _SUMS},
    "faults": dict(sorted(result.faults.items())),
    "troubles": dict(sorted(result.troubles.items())),
    "plans_followed": dict(sorted(result.plans_followed.items())),
    "unheeded": dict(sorted(result.unheeded.items())),
  }


class _Trace:
  """Writes a line for each thing that happens."""

  def __init__(self, file: TextIO):
    self._file = file

  def on_message(
    self, now_s: float, event: str, subject: Envelope | Address
  ) -> None:
    if event == "woken":
      return
    what = str(subject)
    if isinstance(subject, Envelope):
      what = (
        f"{subject.sender}>{subject.receiver}"
        f" {subject.incarnation}.{subject.seq} {subject.body}"
      )
    self._write(now_s, event, what)

  def on_note(self, now_s: float, what: str) -> None:
    self._write(now_s, "note", what)

  def _write(self, now_s: float, event: str, what: str) -> None:
    self._file.write(f"{now_s:12.6f} {event:<10} {what}\n")


def _report(
  result: SeedResult, config: ml_collections.ConfigDict
) -> dict[str, Any]:
  """Prints a violation at once, with the command that replays it."""
  command = ["python", "-m", "experiments.run"]
  command.append("--config=configs/fault_simulation.py")
  command.append(f"--config.seed={result.seed}")
  defaults = {"num_instances": 0, "min_messages": 300, "min_faults": 5}
  command += [
    f"--config.{name}={config[name]}"
    for name, default in defaults.items()
    if config[name] != default
  ]
  tqdm.tqdm.write(f"seed {result.seed}: {result.violation}")
  tqdm.tqdm.write(f"  replay: {shlex.join(command)}")
  return {
    "seed": result.seed,
    "violation": result.violation,
    "replay": shlex.join(command),
  }


def _print(summary: Mapping[str, Any]) -> None:
  totals = summary["totals"]
  print(
    f"{summary['num_seeds']} seeds, {totals['num_events']} message events"
    f" ({totals['num_delivered']} deliveries) in {summary['cpu_s']:.1f} s:"
    f" {summary['message_events_per_s']:,.0f} message events/s"
  )
  print(
    f"{totals['num_requests']} requests ({totals['num_failed']} could not prove"
    f" their KV), {totals['num_tokens']} tokens,"
    f" {totals['num_rows']} rows ({totals['num_unproved']} not proved),"
    f" {totals['num_moved']} rBlocks moved"
  )
  for name in ("faults", "troubles", "plans_followed", "unheeded"):
    counts = ", ".join(f"{k} {n}" for k, n in summary[name].items())
    print(f"{name.replace('_', ' ')}: {counts}")
  print(f"fewest of a seed: {summary['fewest_of_a_seed']}")
  print(f"violations: {summary['num_violations']}")
