"""A long run of requests of all lengths, watched for growth and errors.

In several processes memory, objects and arrays are those of process 0, and so
are compilations that no engine knows of; all else is of the whole group.
"""

import dataclasses
import gc
import math
import os
import pathlib
import random
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import tqdm

from experiments.cluster import build_llm
from experiments.document import Document, make_short_prompt, read_answer
from infinite_llm import LLM, RequestOutput, SamplingParams
from infinite_llm.config import engine_config
from infinite_llm.errors import CapacityError, ConfigError
from infinite_llm.models.needle import build_needle_checkpoint

_MIB = 2**20
_SETTLE_S = 10.0
_HEAR_S = 1.0
"""Members tell several times a second how their rBlocks are used. What they
told last may be older than the end of the last request, but not by so much."""

_MEAN_ABORT_S = 5.0  # From the arrival of a request that is aborted.
_COMPILED = "/jax/core/compile/backend_compile_duration"


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, object]:
  """Runs the soak.

  Args:
    config: As in `configs/soak.py`.
    workdir: Gets the checkpoint.

  Returns:
    What `result.json` is to hold, with the samples over time.

  Raises:
    ConfigError: If a number makes no sense.
  """
  _check(config)
  llm = build_llm(
    build_needle_checkpoint(workdir / "checkpoint", dtype=config.model.dtype),
    engine_config(
      num_instances=config.cluster.num_instances,
      tensor_parallel=config.cluster.tensor_parallel,
      dtype=config.model.dtype,
      seed=config.seed,
      **config.cache.to_dict(),
      **config.lending.to_dict(),
      **config.scheduler.to_dict(),
    ),
    config.cluster.platform,
    show_progress=config.show_progress,
  )
  soak = _Soak(llm, config)
  soak.run()
  result = soak.result()
  print(
    f"{result['num_finished']:,} requests ended, {result['num_aborted']:,}"
    f" aborted, {result['num_wrong']} wrong; {result['blocks_moved']:,} rBlocks"
    f" lent, at most {result['peak_host_blocks']:,} in host memory;"
    f" {result['growth_mib']:+.1f} MiB, {result['num_compiled']} programs"
    f" compiled, {result['blocks_leaked']} rBlocks and"
    f" {result['host_blocks_leaked']} of host memory leaked"
  )
  return result


def _check(config: ml_collections.ConfigDict) -> None:
  requests = config.requests
  for name, value, holds, rule in (
    ("duration_s", config.duration_s, config.duration_s > 0, "positive"),
    (
      "sample_every_s",
      config.sample_every_s,
      0 < config.sample_every_s <= config.duration_s / 10,
      f"in (0, {config.duration_s / 10}], a tenth of duration_s",
    ),
    (
      "requests.num_in_flight",
      requests.num_in_flight,
      requests.num_in_flight >= 1,
      "at least 1",
    ),
    (
      "requests.max_tokens",
      requests.max_tokens,
      requests.max_tokens >= requests.min_tokens,
      f"at least requests.min_tokens ({requests.min_tokens})",
    ),
    (
      "requests.max_more_tokens",
      requests.max_more_tokens,
      requests.max_more_tokens >= 0,
      "at least 0",
    ),
    (
      "requests.aborted",
      requests.aborted,
      0 <= requests.aborted < 1,
      "in [0, 1)",
    ),
  ):
    if not holds:
      raise ConfigError(f"{name} must be {rule}; got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """What is looked at now and then, in process 0.

  Attributes:
    time_s: Since the first request.
    resident_mib: Memory of the process.
    num_objects: Python objects that the collector knows.
    num_arrays: JAX arrays that live.
    num_finished: Requests that have ended by themselves.
  """

  time_s: float
  resident_mib: float
  num_objects: int
  num_arrays: int
  num_finished: int


def growth_mib(samples: Sequence[Sample], duration_s: float) -> float:
  """How much resident memory grew after the beginning.

  Args:
    samples: By time.
    duration_s: How long the run was to be.

  Returns:
    The median of the last fifth of the time less that of the second fifth.
  """

  def median(fifth: int) -> float:
    return statistics.median(
      sample.resident_mib
      for sample in samples
      if fifth <= sample.time_s / duration_s * 5 < fifth + 1
    )

  return median(4) - median(1)


class _Soak:
  """One run: requests in, samples out."""

  def __init__(self, llm: LLM, config: ml_collections.ConfigDict):
    self._engine = llm.engine
    self._tokenizer = llm.model.tokenizer
    self._config = config
    self._rng = random.Random(config.seed)
    self._wanted: dict[str, Document] = {}
    self._abort_at_s: dict[str, float] = {}
    self._samples: list[Sample] = []
    self._wrong: list[Mapping[str, object]] = []
    self._num_added = 0
    self._num_finished = 0
    self._num_aborted = 0
    self._num_compiled = 0
    self._peak_host_blocks = 0
    self._serve_s = 0.0

  def run(self) -> None:
    """Serves until the time is over, and then what is still there.

    Raises:
      ConfigError: If the longest prompt has no room.
    """
    self._check_longest()
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    config, start_s = self._config, time.perf_counter()
    next_sample_s = 0.0
    with tqdm.tqdm(
      total=round(config.duration_s),
      desc="Soak",
      unit="s",
      disable=not config.show_progress,
    ) as bar:
      while True:
        now_s = time.perf_counter() - start_s
        bar.update(min(int(now_s), bar.total) - bar.n)
        if now_s >= next_sample_s:
          self._samples.append(self._sample(now_s))
          next_sample_s += config.sample_every_s
        if now_s < config.duration_s:
          while len(self._wanted) < config.requests.num_in_flight:
            self._add(now_s)
        elif not self._engine.has_unfinished():
          break
        self._abort(now_s)
        for output in self._engine.step():
          self._take(output)
        self._peak_host_blocks = max(
          self._peak_host_blocks,
          sum(each.host_counts.used for each in self._engine.use().instances),
        )
    end_s = time.perf_counter()
    self._serve_s = end_s - start_s
    while (settled_s := time.perf_counter() - end_s) < _SETTLE_S:
      if settled_s >= _HEAR_S and not any(self._leaked()):
        break
      self._engine.settle()
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  def result(self) -> dict[str, object]:
    """What `result.json` says."""
    use = self._engine.use()
    grown_mib = growth_mib(self._samples, self._config.duration_s)
    blocks_leaked, host_blocks_leaked = self._leaked()
    return {
      "correct": not self._wrong,
      "memory_correct": grown_mib <= self._config.max_growth_mib,
      "programs_correct": not (self._num_compiled or use.num_late_compiles),
      "books_correct": not (blocks_leaked or host_blocks_leaked),
      "num_instances": len(use.instances),
      "num_processes": jax.process_count(),
      # Whose memory, objects, arrays and other compilations are watched.
      "sampled_process": jax.process_index(),
      "serve_s": self._serve_s,
      "num_finished": self._num_finished,
      "num_aborted": self._num_aborted,
      "num_wrong": len(self._wrong),
      "wrong": self._wrong[:10],
      "peak_host_blocks": self._peak_host_blocks,
      "blocks_moved": use.num_blocks_moved,
      "unproved_rows": use.num_unproved_rows,
      "num_compiled": self._num_compiled,
      "late_compiles": use.num_late_compiles,
      "blocks_leaked": blocks_leaked,
      "host_blocks_leaked": host_blocks_leaked,
      "growth_mib": grown_mib,
      "program_launches": dict(use.launches),
      "samples": [dataclasses.asdict(sample) for sample in self._samples],
    }

  def _check_longest(self) -> None:
    """Finds out now what would else come up whenever it is drawn."""
    num_tokens = self._config.requests.max_tokens
    longest = make_short_prompt(
      self._tokenizer, num_tokens=num_tokens, seed=self._config.seed
    )
    try:
      self._engine.check(longest.prompt_ids, SamplingParams(max_tokens=1))
    except CapacityError as error:
      raise ConfigError(
        f"requests.max_tokens must be what a request can have; got"
        f" {num_tokens}. {error}"
      ) from error

  def _add(self, now_s: float) -> None:
    """Adds a request of some length; perhaps it is to be aborted."""
    requests, rng = self._config.requests, self._rng
    length = math.exp(
      rng.uniform(math.log(requests.min_tokens), math.log(requests.max_tokens))
    )
    wanted = make_short_prompt(
      self._tokenizer,
      num_tokens=round(length),
      seed=self._config.seed + self._num_added,
    )
    name = f"request-{self._num_added}"
    self._num_added += 1
    self._engine.add_request(
      wanted.prompt_ids,
      SamplingParams(
        max_tokens=len(wanted.answer_ids)
        + rng.randrange(requests.max_more_tokens + 1),
        ignore_eos=True,
      ),
      request_id=name,
    )
    self._wanted[name] = wanted
    if rng.random() < requests.aborted:
      self._abort_at_s[name] = now_s + rng.expovariate(1 / _MEAN_ABORT_S)

  def _abort(self, now_s: float) -> None:
    due = [name for name, at_s in self._abort_at_s.items() if at_s <= now_s]
    for name in due:
      del self._abort_at_s[name]
      self._engine.abort(name)

  def _take(self, output: RequestOutput) -> None:
    """Holds the answer of a request that ended against what it should be."""
    if not output.is_finished:
      return
    wanted = self._wanted.pop(output.request_id)
    self._abort_at_s.pop(output.request_id, None)
    if output.finish_reason == "abort":
      self._num_aborted += 1
      return
    self._num_finished += 1
    # It goes on beyond its answer, so that it decodes for long.
    answer = read_answer(output.text)[: len(wanted.pass_keys)]
    if answer != wanted.pass_keys:
      self._wrong.append(
        {
          "request": output.request_id,
          "answer": answer,
          "expected": wanted.pass_keys,
          "error": output.error and str(output.error),
        }
      )

  def _sample(self, now_s: float) -> Sample:
    gc.collect()
    return Sample(
      time_s=now_s,
      resident_mib=_resident_bytes() / _MIB,
      num_objects=len(gc.get_objects()),
      num_arrays=len(jax.live_arrays()),
      num_finished=self._num_finished,
    )

  def _on_event(self, event: str, duration_s: float, **_: object) -> None:
    self._num_compiled += event == _COMPILED

  def _leaked(self) -> tuple[int, int]:
    """rBlocks of all instances that are not free, in HBM and in HOST."""
    instances = self._engine.use().instances
    return (
      sum(each.counts.total - each.counts.free for each in instances),
      sum(each.host_counts.total - each.host_counts.free for each in instances),
    )


def _resident_bytes() -> int:
  """Memory of this process that is in RAM."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")
