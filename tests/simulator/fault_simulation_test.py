"""Whole histories: right, long enough, and the same every time."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys

import pytest

from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.policies import POLICIES
from infinite_llm.simulator.fault_simulation import run_seed
from infinite_llm.simulator.scenario import draw_scenario
from infinite_llm.simulator.trace import TraceHash

_ROOT = pathlib.Path(__file__).parents[2]

_PRINT_HASH = """
from infinite_llm.simulator.fault_simulation import run_seed
from infinite_llm.simulator.trace import TraceHash
trace = TraceHash()
run_seed(7, observer=trace)
print(trace.hexdigest())
"""


# The last two once found faults of the checks themselves.
@pytest.mark.parametrize("seed", [*range(30), 4603, 8412])
def test_nothing_goes_wrong_whatever_goes_wrong(seed):
  result = run_seed(seed)

  assert result.violation is None
  assert result.num_delivered >= 300
  assert result.num_faults >= 5
  assert result.num_requests > 0
  assert result.num_tokens > 0


@pytest.mark.parametrize("seed", range(20))
def test_more_and_longer_requests_than_fit_all_end(seed):
  drawn = draw_scenario(random.Random(seed))
  scenario = dataclasses.replace(
    drawn,
    long_answers=0.9,
    most_open=3 * drawn.num_instances + 2,
    request_every_s=0.15,
  )

  assert run_seed(seed, scenario=scenario).violation is None


@pytest.fixture(scope="module")
def results():
  return [run_seed(seed) for seed in range(160, 220)]


def test_all_kinds_of_faults_and_moves_happen(results):
  happened = {
    kind
    for result in results
    for counts in (result.faults, result.troubles)
    for kind, count in counts.items()
    if count
  }
  assert happened == {
    "abort",
    "copy lost",
    "crash",
    "cut off",
    "freeze",
    "late",
    "lost",
    "move",
    "nonsense",
    "overtaken",
    "partition",
    "payload lost",
    "payload repeated",
    "preempt",
    "recall",
    "repeated",
    "set aside",
    "skew",
    "spoil",
    "unheard",
    *Mishap,
  }
  assert sum(result.num_moved for result in results) > 0
  assert sum(result.num_swapped for result in results) > 0
  assert sum(result.num_migrated for result in results) > 0
  assert sum(result.num_takeovers for result in results) > 0
  assert sum(result.num_deaths for result in results) > 0
  assert 0.075 < max(result.longest_takeover_s for result in results) <= 0.1
  assert sum(result.num_unproved for result in results) > 0
  assert sum(result.num_behind for result in results) > 0
  assert sum(result.num_slabs for result in results) > 0


def test_plans_to_move_and_to_dissolve_circles_are_followed(results):
  followed = {kind for result in results for kind in result.plans_followed}

  assert followed == {"MoveKvcache", "RecallKvcache"}


def test_what_must_not_be_heeded_is_said_and_counted(results):
  unheeded = {why for result in results for why in +result.unheeded}

  assert unheeded == {"declined", "fenced", "overtaken", "refused"}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_requests_wait_in_host_memory_under_every_policy(policy):
  drawn = ((s, draw_scenario(random.Random(s))) for s in range(200))
  seeds = [
    seed
    for seed, scenario in drawn
    if scenario.lending.policy == policy and scenario.host_blocks
  ]

  assert any(run_seed(seed).num_swapped for seed in seeds)


def test_a_seed_has_one_history_whatever_the_hash_seed():
  digests = {
    subprocess.run(
      [sys.executable, "-c", _PRINT_HASH],
      cwd=_ROOT,
      env={**os.environ, "PYTHONHASHSEED": hash_seed},
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()
    for hash_seed in ("0", "1", "2")
  }

  trace = TraceHash()
  run_seed(7, observer=trace)
  assert digests == {trace.hexdigest()}


def test_another_seed_has_another_history():
  histories = [TraceHash(), TraceHash()]
  for seed, trace in enumerate(histories):
    run_seed(seed, observer=trace)

  assert histories[0].hexdigest() != histories[1].hexdigest()
