"""Cases in which one lending group has all instances."""

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable

import jax

from experiments.case_runner import CaseRunner, Loads
from experiments.case_turns import SHARING, CaseTurns
from experiments.cluster import build_llm
from experiments.spilling_request import SpillingRequest
from experiments.steady_load import AnyEngine, drive, serve
from infinite_llm.distributed.group_messages import EngineUse
from infinite_llm.engine.engine import Engine
from infinite_llm.models.loaded_model import LoadedModel

_REPORT_S = 0.1
"""Within this time other processes have reported what they did."""


def run_here(runner: CaseRunner, model: LoadedModel) -> None:
  """Runs all instances in this process.

  Args:
    runner: Runs those cases that its config names.
    model: Weights on all instances.
  """
  with runner.log.timed("warm-up of the sharing engine"):
    num_instances = runner.config.cluster.num_instances
    engine = Engine(model, runner.engine_config(num_instances))
    engine.warm_up()
  _run(runner, engine)


def run_process(runner: CaseRunner) -> None:
  """Runs process 0 of a group; the others are members.

  Args:
    runner: Runs those cases that its config names.
  """
  config = runner.config
  with runner.log.timed("warm-up"):
    engine = build_llm(
      pathlib.Path(config.child.folder) / "model",
      runner.engine_config(config.cluster.num_instances),
      config.cluster.platform,
      show_progress=False,
    ).engine
    runner.log.device = jax.local_devices()[0].device_kind
  # Members and managers want to hear of this process all the time.
  _run(runner, engine, CaseTurns(config, SHARING, meanwhile=engine.settle))


def _run(
  runner: CaseRunner, engine: AnyEngine, turns: CaseTurns | None = None
) -> None:
  """Without a spill and with one."""
  config, log = runner.config, runner.log

  def together(repeat: int) -> Loads:
    with turns.turn(repeat) if turns else contextlib.nullcontext():
      return serve_all(repeat)

  def serve_all(repeat: int) -> Loads:
    loads = {
      instance: runner.load(engine, instance, "sharing", repeat)
      for instance in range(config.cluster.num_instances)
    }
    each = [*loads.values()]
    drive(engine, each, lambda: all(load.is_over for load in each))
    return loads

  if "sharing" in config.cases:
    runner.measure("sharing", [engine], together)
    use = _settled_use(engine)
    log.launches["sharing"] = launches = dict(use.launches)
    spent = {name: n for name, n in launches.items() if "local" not in name}
    spent.pop("write_entries", None)
    if spent or use.num_blocks_moved:
      log.faults.append(f"sharing: something was lent; launched {spent}")
  if "spilling" in config.cases:
    _run_spilling(runner, engine)
  runner.check_empty(engine, "the sharing engine")


def _run_spilling(runner: CaseRunner, engine: AnyEngine) -> None:
  """The load, beside the two halves of a request that spills."""
  config, log = runner.config, runner.log
  long = SpillingRequest(engine, config)
  owner = config.long.instance
  for case, may_begin, is_past in (
    ("spilling, prefill", long.has_spilled, long.has_token),
    ("spilling, decode", long.has_token, long.has_ended),
  ):
    while not (may_begin() or is_past()):
      serve(engine, (), long.take)
    before = collections.Counter(dict(engine.use().launches))
    lent, done = long.lent(), long.done_tokens()
    started_s = time.perf_counter()

    def serve_loads(
      repeat: int,
      is_past: Callable[[], bool] = is_past,
      started_s: float = started_s,
      done: int = done,
      case: str = case,
    ) -> Loads:
      loads = {
        instance: runner.load(engine, instance, case, repeat)
        for instance in range(config.cluster.num_instances)
      }
      # Its owner may be too short of rBlocks to serve anyone else.
      others = [load for i, load in loads.items() if i != owner]

      def is_over() -> bool:
        if not (is_past() or all(load.is_over for load in others)):
          return False
        took_s = time.perf_counter() - started_s
        log.long[case] = {
          "tokens": long.done_tokens() - done,
          "lent_blocks": long.lent(),
          "tokens_per_s": (long.done_tokens() - done) / took_s,
        }
        return True

      drive(engine, [*loads.values()], is_over, long.take)
      return loads

    runner.measure(
      case, [engine], serve_loads, repeats=1, owner=owner, lent=lent
    )
    after = collections.Counter(dict(engine.use().launches))
    log.launches[case] = dict(after - before)
    if not any(lent):
      log.faults.append(f"{case}: nothing was lent")
  while not long.has_ended():
    serve(engine, (), long.take)
  log.faults += long.faults()


def _settled_use(engine: AnyEngine) -> EngineUse:
  """What was done, also what other processes have yet to report."""
  deadline_s = time.perf_counter() + _REPORT_S
  while time.perf_counter() < deadline_s:
    engine.settle()
  return engine.use()
