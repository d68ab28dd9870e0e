"""Runs cases of `no_spill_cost` on engines, and writes down what came out."""

import collections
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import ml_collections

from experiments.case_log import CaseLog
from experiments.steady_load import AnyEngine, LoadShape, Seen, SteadyLoad
from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.types import InstanceId

_SETTLE_S = 10.0
_COMPILED = "/jax/core/compile/backend_compile_duration"

type Loads = Mapping[InstanceId, SteadyLoad]
"""Loads that are over, by the instance that each is of."""


class CaseRunner:
  """Runs cases, one after the other.

  Attributes:
    config: See `configs/no_spill_cost.py`.
    log: Gets what they give.
  """

  def __init__(self, config: ml_collections.ConfigDict, log: CaseLog):
    """Runs none yet."""
    self.config = config
    self.log = log

  def engine_config(self, num_instances: int) -> EngineConfig:
    """Sizes and rules of an engine of so many instances."""
    config = self.config
    return engine_config(
      num_instances=num_instances,
      tensor_parallel=config.cluster.tensor_parallel,
      dtype=config.model.dtype,
      load_format="dummy",
      seed=config.seed,
      **config.cache.to_dict(),
      **config.lending.to_dict(),
      **config.scheduler.to_dict(),
    )

  def load(
    self, engine: AnyEngine, instance: InstanceId, case: str, repeat: int
  ) -> SteadyLoad:
    """What an instance is asked for, the same in every case and repeat."""
    shape = self.config.decode if instance else self.config.prefill
    return SteadyLoad(
      engine,
      instance if engine.config.num_instances > 1 else 0,
      LoadShape(**shape.to_dict()),
      name=f"{case} {repeat} {instance}",
      seed=self.config.seed + 1 + instance,
      vocab_size=self.config.model.vocab_size,
    )

  def measure(
    self,
    case: str,
    engines: Sequence[AnyEngine],
    serve_loads: Callable[[int], Loads],
    *,
    repeats: int | None = None,
    **more: object,
  ) -> None:
    """Runs a case some times; adds a row for each instance.

    Args:
      case: Its name.
      engines: Those that it runs on.
      serve_loads: Runs it once; is given the number of the repeat.
      repeats: How often; None takes the config's.
      **more: More fields of the rows.
    """
    log = self.log
    seen = collections.defaultdict[InstanceId, list[Seen]](list)
    answered = collections.Counter[InstanceId]()
    aborted = collections.Counter[InstanceId]()
    before = _num_late_compiles(engines)
    with log.timed(case):
      with _compile_count() as compiled_here:
        for repeat in range(repeats or self.config.repeats):
          for instance, load in serve_loads(repeat).items():
            seen[instance].append(load.seen())
            answered[instance] += load.num_answered
            aborted[instance] += load.num_aborted
            log.faults += [f"{case}: {wrong}" for wrong in load.wrong]
            answers = load.answers.items()
            log.compare(case, {f"{instance}-{n}": a for n, a in answers})
      # Engines count their own programs, those of other processes too.
      late = _num_late_compiles(engines) - before
      if count := max(late, len(compiled_here)):
        log.faults.append(f"{case}: {count} programs were compiled")
      for instance, mine in sorted(seen.items()):
        fields = [dataclasses.asdict(each) for each in mine]
        log.rows.append(
          {
            "case": case,
            "instance": instance,
            "load": "decode" if instance else "prefill",
            **{name: _median(f[name] for f in fields) for name in fields[0]},
            "tokens_per_s_of_runs": [_tokens_per_s(each) for each in mine],
            "requests": answered[instance],
            "requests_aborted": aborted[instance],
            **more,
          }
        )

  def check_empty(self, engine: AnyEngine, name: str) -> None:
    """Notes rBlocks that nobody gave back, though no request is left."""
    deadline_s = time.perf_counter() + _SETTLE_S
    while (leaked := _leaked(engine)) and time.perf_counter() < deadline_s:
      engine.settle()
    if leaked:
      self.log.faults.append(f"{name} lost {leaked} rBlocks")


@contextlib.contextmanager
def _compile_count() -> Iterator[list[float]]:
  """Gives a list that gets the time of each compilation in this process."""
  times: list[float] = []

  def listen(event: str, duration_s: float, **_: object) -> None:
    if event == _COMPILED:
      times.append(duration_s)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield times
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _num_late_compiles(engines: Sequence[AnyEngine]) -> int:
  return sum(engine.use().num_late_compiles for engine in engines)


def _leaked(engine: AnyEngine) -> int:
  return sum(counts.total - counts.free for counts in engine.pool_counts())


def _tokens_per_s(seen: Seen) -> float:
  return seen.prompt_tokens_per_s + seen.output_tokens_per_s


def _median(values: Iterator[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.median(known) if known else None
