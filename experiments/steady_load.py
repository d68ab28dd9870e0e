"""A load that never pauses, and what it gets, as its caller sees it."""

import concurrent.futures
import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from infinite_llm.engine.engine import Engine
from infinite_llm.engine.group_engine import GroupEngine
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import InstanceId

type AnyEngine = Engine | GroupEngine


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadShape:
  """What one instance is asked for, all the time.

  Attributes:
    num_in_flight: Requests at once; one that ends makes room for another.
    prompt_tokens: Of each.
    max_tokens: Of the answer of each.
    warm_steps: Steps that gave tokens before the window begins, once as many
      requests as are in flight have begun to.
    steps: Those within the window.
  """

  num_in_flight: int
  prompt_tokens: int
  max_tokens: int
  warm_steps: int
  steps: int

  @property
  def most_tokens(self) -> int:
    """That all requests at once have at most."""
    return self.num_in_flight * (self.prompt_tokens + self.max_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """What came out within a window.

  Attributes:
    steps: Steps that gave tokens. Fewer than were wanted if it was cut short.
    window_s: From the step before the first of them to the last.
    prompt_tokens_per_s: Of prompts that were done.
    output_tokens_per_s: Of answers.
    itl_ms: Median time between two tokens of a request; None if none has two.
    itl_p99_ms: What one in a hundred of these times is above.
  """

  steps: int
  window_s: float
  prompt_tokens_per_s: float
  output_tokens_per_s: float
  itl_ms: float | None
  itl_p99_ms: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mark:
  """A step that gave tokens of this load, as of the moment they were seen."""

  time_s: float
  prompt_tokens: int
  output_tokens: int
  gaps_s: tuple[float, ...]


class SteadyLoad:
  """Requests of one instance, and the times at which their tokens came.

  Attributes:
    answers: Tokens that each request got, by its number: all of its answer, or
      its beginning if it was aborted.
    wrong: Requests that did not end as they should, and why.
    num_answered: Those that did.
    num_aborted: Those that were given up.
  """

  def __init__(
    self,
    engine: AnyEngine,
    instance: InstanceId,
    shape: LoadShape,
    *,
    name: str,
    seed: int,
    vocab_size: int,
  ):
    """Asks for nothing yet.

    Args:
      engine: Who is asked.
      instance: Which of its instances.
      shape: For what.
      name: First part of the requests' names: nobody else's, ever, since what
        a process says of a request that was aborted may come late.
      seed: Of the prompts.
      vocab_size: V.
    """
    self._engine = engine
    self._instance = instance
    self._shape = shape
    self._name = name
    self._seed = seed
    self._vocab_size = vocab_size
    self._num_added = 0
    self._num_begun = 0
    self._is_wanted = True
    self._last_s: dict[str, float | None] = {}
    self._marks: list[_Mark] = []
    self.answers: dict[int, tuple[int, ...]] = {}
    self.wrong: list[str] = []
    self.num_answered = 0
    self.num_aborted = 0

  @property
  def is_over(self) -> bool:
    """Whether the window is."""
    # The step that begins it is the last but those within.
    return len(self._marks) > self._shape.warm_steps + self._shape.steps

  @property
  def is_empty(self) -> bool:
    """Whether all requests ended."""
    return not self._last_s

  def owns(self, output: RequestOutput) -> bool:
    """Whether an output is of a request of this load."""
    return output.request_id in self._last_s

  def fill(self) -> None:
    """Asks for as much as is to be in flight, unless it was ended."""
    while self._is_wanted and len(self._last_s) < self._shape.num_in_flight:
      draw = np.random.default_rng((self._seed, self._num_added))
      name = f"{self._name}-{self._num_added}"
      self._num_added += 1
      self._engine.add_request(
        draw.integers(self._vocab_size, size=self._shape.prompt_tokens),
        SamplingParams(max_tokens=self._shape.max_tokens, ignore_eos=True),
        request_id=name,
        instance=self._instance,
      )
      self._last_s[name] = None

  def take(self, outputs: Sequence[RequestOutput], now_s: float) -> None:
    """Notes what a step gave to this load's requests.

    Args:
      outputs: Of its requests alone.
      now_s: When they were seen.
    """
    prompt_tokens = output_tokens = 0
    gaps_s = []
    for output in outputs:
      name = output.request_id
      new = output.extent.num_tokens - output.seen.num_tokens
      if new:
        last_s = self._last_s[name]
        if last_s is None:
          self._num_begun += 1
          prompt_tokens += len(output.prompt_token_ids)
        else:
          gaps_s.append(now_s - last_s)
        self._last_s[name] = now_s
        output_tokens += new
      if output.is_finished:
        self._end(output)
    if output_tokens and self._num_begun >= self._shape.num_in_flight:
      self._marks.append(
        _Mark(
          time_s=now_s,
          prompt_tokens=prompt_tokens,
          output_tokens=output_tokens,
          gaps_s=tuple(gaps_s),
        )
      )

  def end(self) -> None:
    """Asks for no more, and gives up what has not ended."""
    self._is_wanted = False
    for name in self._last_s:
      self._engine.abort(name)

  def seen(self) -> Seen:
    """What came out within the window."""
    first = min(self._shape.warm_steps, max(len(self._marks) - 2, 0))
    window = self._marks[first : first + 1 + self._shape.steps]
    marks = window[1:]
    if not marks:
      return Seen(
        steps=0,
        window_s=0.0,
        prompt_tokens_per_s=0.0,
        output_tokens_per_s=0.0,
        itl_ms=None,
        itl_p99_ms=None,
      )
    window_s = marks[-1].time_s - window[0].time_s
    gaps_s = sorted(gap for mark in marks for gap in mark.gaps_s)
    return Seen(
      steps=len(marks),
      window_s=window_s,
      prompt_tokens_per_s=sum(m.prompt_tokens for m in marks) / window_s,
      output_tokens_per_s=sum(m.output_tokens for m in marks) / window_s,
      itl_ms=statistics.median(gaps_s) * 1e3 if gaps_s else None,
      itl_p99_ms=gaps_s[math.ceil(0.99 * len(gaps_s)) - 1] * 1e3
      if gaps_s
      else None,
    )

  def _end(self, output: RequestOutput) -> None:
    name = output.request_id
    del self._last_s[name]
    tokens = output.token_ids
    if output.finish_reason == "abort":
      self.num_aborted += 1
    elif (
      output.finish_reason == "length" and len(tokens) == self._shape.max_tokens
    ):
      self.num_answered += 1
    else:
      self.wrong.append(
        f"{name}: {output.finish_reason} after {len(tokens)} tokens,"
        f" {output.error}"
      )
      return
    self.answers[int(name.rpartition("-")[2])] = tokens


def serve(
  engine: AnyEngine,
  loads: Sequence[SteadyLoad],
  take_other: Callable[[RequestOutput], None],
) -> None:
  """One step: its outputs go to whose they are, and loads are filled again.

  Args:
    engine: What all loads ask.
    loads: Of its instances.
    take_other: Gets the outputs of requests that are of none of them.
  """
  for load in loads:
    load.fill()
  outputs = engine.step()
  now_s = time.perf_counter()
  mine: dict[SteadyLoad, list[RequestOutput]] = {load: [] for load in loads}
  for output in outputs:
    load = next((load for load in loads if load.owns(output)), None)
    if load is None:
      take_other(output)
    else:
      mine[load].append(output)
  for load, taken in mine.items():
    load.take(taken, now_s)


def drive(
  engine: AnyEngine,
  loads: Sequence[SteadyLoad],
  is_over: Callable[[], bool],
  take_other: Callable[[RequestOutput], None] = lambda _: None,
) -> None:
  """Keeps loads up until it is over, and then gives up what is still there.

  To wait for answers that nobody needs would take as long as the windows.

  Args:
    engine: What all loads ask.
    loads: Of its instances.
    is_over: Whether there is enough; asked after each step.
    take_other: Gets the outputs of requests that are of none of them.
  """
  while not is_over():
    serve(engine, loads, take_other)
  for load in loads:
    load.end()
  while not all(load.is_empty for load in loads):
    serve(engine, loads, take_other)


def drive_each(engines: Sequence[Engine], loads: Sequence[SteadyLoad]) -> None:
  """Drives all engines at once, until the windows of all loads are over.

  A thread each: a step waits for its own engine's devices, and one thread would
  have the others idle meanwhile. The threads share one interpreter, as the
  instances of one engine share its thread.

  Args:
    engines: Each of its own devices.
    loads: Of each.
  """
  has_failed = threading.Event()

  def is_over() -> bool:
    return has_failed.is_set() or all(load.is_over for load in loads)

  def drive_one(engine: AnyEngine, load: SteadyLoad) -> None:
    try:
      drive(engine, [load], is_over)
    except BaseException:
      has_failed.set()
      raise

  with concurrent.futures.ThreadPoolExecutor(len(engines)) as threads:
    for future in [
      *map(threads.submit, [drive_one] * len(loads), engines, loads)
    ]:
      future.result()
