"""No spill, no cost: what sharing costs, with spills and without.

Instance 0 prefills long prompts all the time, the others decode full batches.
That is measured four times:

- *alone*: an engine for each instance, one after the other: what a process of
  its own gives that shares nothing, not even a processor core.
- *separate*: the same engines at once, a thread for each.
- *sharing*: one engine of all instances, which lends, but needs not to.
- *spilling*: the same beside a request that no instance can hold, once while
  it is prefilled and once while it decodes.

    python -m experiments.run --config=configs/no_spill_cost.py
      --workdir=runs/no_spill_cost
"""

import collections
import contextlib
import dataclasses
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections

from experiments.case_ratios import case_ratios, cases_report
from experiments.random_model import random_model
from experiments.run_facts import run_facts
from experiments.spilling_request import SpillingRequest
from experiments.steady_load import (
  LoadShape,
  Seen,
  SteadyLoad,
  drive,
  drive_each,
  serve,
)
from infinite_llm.cache.rows import split_rows
from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.engine.engine import Engine
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel

_SETTLE_S = 10.0
_COMPILED = "/jax/core/compile/backend_compile_duration"

_Row = dict[str, Any]


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs all cases.

  Args:
    config: See `configs/no_spill_cost.py`.
    workdir: Gets `rows.json`.

  Returns:
    `rows`, `ratios` of two cases each, and whether all is `correct`.
  """
  _check(config)
  choose_platform(config.platform)
  num_devices = config.num_instances * config.tensor_parallel
  if config.platform == "cpu":
    # Where JAX runs already, it keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", num_devices)
  check_platform(config.platform)
  bench = _Bench(config)
  bench.run_separate()
  gc.collect()  # Pools leave the devices before the next ones are placed.
  bench.run_sharing()
  about = run_facts(num_devices)
  rows = [{**row, **about} for row in bench.rows]
  ratios = [{**ratio, **about} for ratio in case_ratios(bench.rows)]
  text = json.dumps({"rows": rows, "ratios": ratios}, indent=1) + "\n"
  (workdir / "rows.json").write_text(text, encoding="utf-8")
  print(cases_report(rows, ratios))
  for fault in bench.faults:
    print(f"WRONG: {fault}")
  return {
    "rows": rows,
    "ratios": ratios,
    "long": bench.long,
    "launches": bench.launches,
    "answers_compared": bench.num_compared,
    "answers_different": bench.num_different,
    "faults": bench.faults,
    "correct": not bench.faults,
  }


def _check(config: ml_collections.ConfigDict) -> None:
  """Refuses loads that spill by themselves, and a long one that would not."""
  capacity = (config.cache.num_blocks - 1) * config.cache.block_size
  for name, value, holds, rule in (
    ("num_instances", config.num_instances, config.num_instances >= 2, "2"),
    ("repeats", config.repeats, config.repeats >= 1, "1"),
    (
      "long.prompt_tokens",
      config.long.prompt_tokens,
      not config.long.run or config.long.prompt_tokens > capacity,
      f"{capacity + 1}, more than an instance holds",
    ),
  ):
    if not holds:
      raise ConfigError(f"{name} must be at least {rule}; got {value}.")
  for name in ("prefill", "decode"):
    shape = LoadShape(**config[name].to_dict())
    if shape.most_tokens > capacity:
      raise ConfigError(
        f"{name} must have at most {capacity} tokens in flight, what an"
        f" instance holds; got {shape.most_tokens}."
      )
  decode = config.decode
  if decode.warm_steps + decode.steps >= decode.max_tokens:
    raise ConfigError(
      f"decode.max_tokens must be more than warm_steps + steps; got"
      f" {decode.max_tokens}."
    )


class _Bench:
  """All cases, and what they gave.

  Attributes:
    rows: What each instance saw in each case.
    launches: Programs that the sharing engine launched in each of its cases.
    long: How fast the long request was.
    faults: What was not as it must be.
    num_compared: Answers that were held against those of the first case.
    num_different: Those among them that were others.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    """Draws the weights, once for all engines."""
    self._config = config
    self._instances = range(config.num_instances)
    self._model = random_model(
      config.model,
      make_mesh(config.num_instances, config.tensor_parallel),
      config.seed,
    )
    self._answers: dict[str, tuple[int, ...]] = {}
    self.rows: list[_Row] = []
    self.launches: dict[str, dict[str, int]] = {}
    self.long: _Row = {}
    self.faults: list[str] = []
    self.num_compared = 0
    self.num_different = 0

  def run_separate(self) -> None:
    """An engine for each instance, alone and then all at once."""
    engines = [
      _warm(Engine(_row_of(self._model, i), self._engine_config(1)))
      for i in self._instances
    ]

    def alone() -> list[SteadyLoad]:
      loads = [self._load(e, i) for i, e in enumerate(engines)]
      for engine, load in zip(engines, loads, strict=True):
        drive(engine, [load], lambda load=load: load.is_over)
      return loads

    def together() -> list[SteadyLoad]:
      loads = [self._load(e, i) for i, e in enumerate(engines)]
      drive_each(engines, loads)
      return loads

    self._measure("alone", alone)
    self._measure("separate", together)
    for instance, engine in enumerate(engines):
      self._check_empty(engine, f"the engine of instance {instance}")

  def run_sharing(self) -> None:
    """One engine of all instances, without a spill and with one."""
    engine = _warm(
      Engine(self._model, self._engine_config(self._config.num_instances))
    )

    def together() -> list[SteadyLoad]:
      loads = [self._load(engine, i) for i in self._instances]
      drive(engine, loads, lambda: all(load.is_over for load in loads))
      return loads

    self._measure("sharing", together)
    self.launches["sharing"] = launches = dict(engine.use().launches)
    spent = {name: n for name, n in launches.items() if "local" not in name}
    spent.pop("write_entries", None)
    if spent or engine.use().num_blocks_moved:
      self.faults.append(f"sharing: something was lent; launched {spent}")
    if self._config.long.run:
      self._run_spilling(engine)
    self._check_empty(engine, "the sharing engine")

  def _run_spilling(self, engine: Engine) -> None:
    """The load again, beside the two halves of a request that spills."""
    long = SpillingRequest(engine, self._config)
    owner = self._config.long.instance
    for case, may_begin, is_past in (
      ("spilling, prefill", long.has_spilled, long.has_token),
      ("spilling, decode", long.has_token, long.has_ended),
    ):
      while not (may_begin() or is_past()):
        serve(engine, (), long.take)
      before = collections.Counter(dict(engine.use().launches))
      lent, done = long.lent(), long.done_tokens()
      started_s = time.perf_counter()

      def load_all(
        is_past: Callable[[], bool] = is_past,
        started_s: float = started_s,
        done: int = done,
        case: str = case,
      ) -> list[SteadyLoad]:
        loads = [self._load(engine, i) for i in self._instances]
        # Its owner may be too short of rBlocks to serve anyone else.
        others = [load for i, load in enumerate(loads) if i != owner]

        def is_over() -> bool:
          if not (is_past() or all(load.is_over for load in others)):
            return False
          took_s = time.perf_counter() - started_s
          self.long[case] = {
            "tokens": long.done_tokens() - done,
            "lent_blocks": long.lent(),
            "tokens_per_s": (long.done_tokens() - done) / took_s,
          }
          loads[owner].end(at_once=True)
          return True

        drive(engine, loads, is_over, long.take)
        return loads

      self._measure(case, load_all, repeats=1, owner=owner, lent=lent)
      after = collections.Counter(dict(engine.use().launches))
      self.launches[case] = dict(after - before)
      if not any(lent):
        self.faults.append(f"{case}: nothing was lent")
    while not long.has_ended():
      serve(engine, (), long.take)
    self.faults += long.faults()

  def _measure(
    self,
    case: str,
    serve_loads: Callable[[], list[SteadyLoad]],
    *,
    repeats: int | None = None,
    **more: object,
  ) -> None:
    """Runs a case some times; adds a row for each instance."""
    runs: list[list[Seen]] = []
    answered: collections.Counter[int] = collections.Counter()
    aborted: collections.Counter[int] = collections.Counter()
    with _compile_count() as count:
      for _ in range(repeats or self._config.repeats):
        loads = serve_loads()
        runs.append([load.seen() for load in loads])
        for instance, load in enumerate(loads):
          answered[instance] += len(load.answers)
          aborted[instance] += load.num_aborted
          self.faults += [f"{case}: {wrong}" for wrong in load.wrong]
          self._compare(case, load.answers)
    if count:
      self.faults.append(f"{case}: {len(count)} programs were compiled")
    for instance in self._instances:
      mine = [seen[instance] for seen in runs]
      rates = [_tokens_per_s(seen) for seen in mine]
      fields = [dataclasses.asdict(seen) for seen in mine]
      self.rows.append(
        {
          "case": case,
          "instance": instance,
          "load": "decode" if instance else "prefill",
          **{name: _median(f[name] for f in fields) for name in fields[0]},
          "tokens_per_s_of_runs": rates,
          "requests": answered[instance],
          "requests_aborted": aborted[instance],
          **more,
        }
      )

  def _compare(self, case: str, answers: Mapping[str, tuple[int, ...]]) -> None:
    """Holds answers against the first ones to the same prompts."""
    different = 0
    for name, answer in answers.items():
      self.num_compared += name in self._answers
      different += answer != self._answers.setdefault(name, answer)
    self.num_different += different
    # In bfloat16 two tokens are often equally likely, by random weights.
    if different and self._config.model.dtype == "float32":
      self.faults.append(f"{case}: {different} answers are others")

  def _engine_config(self, num_instances: int) -> EngineConfig:
    config = self._config
    return engine_config(
      num_instances=num_instances,
      tensor_parallel=config.tensor_parallel,
      dtype=config.model.dtype,
      seed=config.seed,
      **config.cache.to_dict(),
      **config.lending.to_dict(),
      **config.scheduler.to_dict(),
    )

  def _load(self, engine: Engine, instance: int) -> SteadyLoad:
    shape = self._config.decode if instance else self._config.prefill
    return SteadyLoad(
      engine,
      instance if len(engine.instances) > 1 else 0,
      LoadShape(**shape.to_dict()),
      name=str(instance),
      seed=self._config.seed + 1 + instance,
      vocab_size=self._config.model.vocab_size,
    )

  def _check_empty(self, engine: Engine, name: str) -> None:
    deadline_s = time.perf_counter() + _SETTLE_S
    while (leaked := _leaked(engine)) and time.perf_counter() < deadline_s:
      engine.settle()
    if leaked:
      self.faults.append(f"{name} lost {leaked} rBlocks")


def _row_of(model: LoadedModel, instance: int) -> LoadedModel:
  """The model of one instance alone, made of the same weights in memory."""
  row = row_mesh(model.mesh, instance)
  state = jax.tree.map(
    lambda leaf: split_rows(leaf, [row], leaf.sharding.spec)[0], model.state
  )
  return dataclasses.replace(model, mesh=row, state=state)


def _warm(engine: Engine) -> Engine:
  engine.warm_up()
  return engine


@contextlib.contextmanager
def _compile_count() -> Iterator[list[float]]:
  """Gives a list that gets the time of each compilation."""
  times: list[float] = []

  def listen(event: str, duration_s: float, **_: object) -> None:
    if event == _COMPILED:
      times.append(duration_s)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield times
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _leaked(engine: Engine) -> int:
  return sum(counts.total - counts.free for counts in engine.pool_counts())


def _tokens_per_s(seen: Seen) -> float:
  return seen.prompt_tokens_per_s + seen.output_tokens_per_s


def _median(values: Iterator[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.median(known) if known else None
