"""The main job: one answer from a document that fits in no single instance.

A long text with pass keys hidden in it goes to instance 0 and asks for all of
them, while short requests keep the other instances busy. Instance 0 runs out of
rBlocks and borrows from the others; the answer is right only if it attends to
every rBlock, wherever it lies.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
import tokenizers
import tqdm

from experiments import document
from experiments.block_map import BlockMap, take_block_map
from experiments.cluster import build_llm
from experiments.rblock_plot import plot_block_map
from experiments.report import serving_report
from infinite_llm import LLM, RequestOutput, SamplingParams
from infinite_llm.config import EngineConfig
from infinite_llm.config import engine_config as config_from_options
from infinite_llm.engine.admission import check_request
from infinite_llm.errors import ConfigError, RequestError
from infinite_llm.models.needle import build_needle_checkpoint
from infinite_llm.types import InstanceId

_LONG = "document"
_OWNER: InstanceId = 0
_SPARE_TOKENS = 16  # Of an answer, so that a wrong one may go on a little.


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, object]:
  """Runs the job and prints its tables.

  Args:
    config: As in `configs/quickstart.py`.
    workdir: Gets `rblocks.png`.

  Returns:
    What `result.json` is to hold.
  """
  start_s = time.perf_counter()
  checkpoint = _build_checkpoint(config, workdir)
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
  with _naming("document"):
    long = document.make_document(
      tokenizer,
      num_tokens=config.document.num_tokens,
      num_needles=config.document.num_needles,
      depths=_depths(config.document.depths),
      path=config.document.path,
      seed=config.seed,
    )
  engine_config = make_engine_config(
    config,
    context_tokens=len(long.prompt_ids) + len(long.answer_ids) + _SPARE_TOKENS,
  )
  # Now rather than after minutes of compilation.
  vocab_size = tokenizer.get_vocab_size()
  with _naming("document"):
    _check(long, engine_config, vocab_size)
  with _naming("short_requests"):
    _check(_make_short(tokenizer, config, number=1), engine_config, vocab_size)
  llm = build_llm(
    checkpoint,
    engine_config,
    config.cluster.platform,
    show_progress=config.show_progress,
  )
  ready_s = time.perf_counter()
  job = _Job(llm, config, long)
  job.run()
  end_s = time.perf_counter()

  result = {
    **job.result(),
    "warm_up_s": ready_s - start_s,
    "wall_s": end_s - start_s,
  }
  if job.block_map is not None:
    _plot(job.block_map, long, result, workdir / "rblocks.png")
  print(f"\n{serving_report(result)}")
  return result


def make_engine_config(
  config: ml_collections.ConfigDict, *, context_tokens: int
) -> EngineConfig:
  """Translates the config; sizes the pools if it does not.

  Args:
    config: As in `configs/quickstart.py`.
    context_tokens: Tokens of the long request, its answer included.

  Returns:
    The engine's configuration.
  """
  cache = config.cache.to_dict()
  if cache["num_blocks"] is None:
    # All instances together hold 4/3 of the context beside their headroom:
    # with four of them, each about a third of it.
    block_size, num_instances = (
      cache["block_size"],
      config.cluster.num_instances,
    )
    share = 4 * context_tokens / (3 * max(num_instances, 1))
    cache["num_blocks"] = (
      1 + math.ceil(share / max(block_size, 1)) + config.lending.headroom_blocks
    )
  engine_config = config_from_options(
    num_instances=config.cluster.num_instances,
    tensor_parallel=config.cluster.tensor_parallel,
    dtype=config.model.dtype,
    seed=config.seed,
    **cache,
    **config.lending.to_dict(),
    **config.scheduler.to_dict(),
  )
  return engine_config.with_num_blocks(cache["num_blocks"])


@contextlib.contextmanager
def _naming(section: str) -> Iterator[None]:
  """Names the part of the config that an error is about."""
  try:
    yield
  except (ConfigError, RequestError) as error:
    raise type(error)(f"{section}: {error}") from error


def _check(
  wanted: document.Document, config: EngineConfig, vocab_size: int
) -> None:
  check_request(wanted.prompt_ids, SamplingParams(), _OWNER, config, vocab_size)


def _make_short(
  tokenizer: tokenizers.Tokenizer,
  config: ml_collections.ConfigDict,
  *,
  number: int,
) -> document.Document:
  """The prompt of a short request; the long one has number 0."""
  num_in_flight = config.short_requests.num_in_flight
  if num_in_flight < 0:
    raise ConfigError(
      f"num_in_flight must not be negative; got {num_in_flight}."
    )
  return document.make_short_prompt(
    tokenizer,
    num_tokens=config.short_requests.num_tokens,
    seed=config.seed + number,
  )


def _depths(depths: Sequence[object]) -> tuple[float, ...] | None:
  if not all(isinstance(depth, int | float) for depth in depths):
    raise ConfigError(
      f"depths must be numbers in [0, 1]; got {tuple(depths)!r}."
    )
  return tuple(depths) or None


def _build_checkpoint(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  path = config.model.path or workdir / "checkpoint"
  try:
    return build_needle_checkpoint(path, dtype=config.model.dtype)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _plot(
  block_map: BlockMap,
  long: document.Document,
  result: Mapping[str, object],
  path: pathlib.Path,
) -> None:
  title = f"One request of {result['context_tokens']:,} tokens"
  if result["context_tokens"] > result["capacity_tokens_per_instance"]:
    title += (
      "; no instance has room for more than"
      f" {result['capacity_tokens_per_instance']:,}"
    )
  plot_block_map(
    block_map,
    _LONG,
    path,
    title=title,
    marks={f"#{needle.name}": needle.span.start for needle in long.needles},
  )


@dataclasses.dataclass(kw_only=True)
class _InstanceUse:
  """What one instance did; `own` and `hosted` are rBlocks."""

  requests: int = 0
  prompt_tokens: int = 0
  output_tokens: int = 0
  peak_own: int = 0
  peak_hosted: int = 0


class _Job:
  """One run: requests in, observations out.

  Attributes:
    block_map: The pools at the most interesting moment of decoding; None if
      the long request never got that far.
  """

  def __init__(
    self,
    llm: LLM,
    config: ml_collections.ConfigDict,
    long: document.Document,
  ):
    self._llm = llm
    self._engine = llm.engine
    self._config = config
    self._long = long
    self._num_instances = config.cluster.num_instances
    self._wanted: dict[str, document.Document] = {}
    self._outputs: dict[str, RequestOutput] = {}
    self._uses = [_InstanceUse() for _ in range(self._num_instances)]
    self._lent = [[0] * self._num_instances for _ in range(self._num_instances)]
    self._first_token_s: float | None = None
    self._serve_s = 0.0
    self._long_s = 0.0
    self.block_map: BlockMap | None = None

  def run(self) -> None:
    """Serves the long request, and short ones until it is done."""
    start_s = time.perf_counter()
    self._add(_LONG, self._long, _OWNER)
    others = [n for n in range(self._num_instances) if n != _OWNER]
    in_flight = dict.fromkeys(
      others or [_OWNER], self._config.short_requests.num_in_flight
    )
    for instance, count in in_flight.items():
      for _ in range(count):
        self._add_short(instance)
    total = len(self._long.prompt_ids)
    with tqdm.tqdm(
      total=total,
      desc="Prefill",
      unit="token",
      disable=not self._config.show_progress,
    ) as bar:
      while self._engine.has_unfinished():
        for output in self._engine.step():
          self._take(output, start_s)
        self._observe()
        if self._first_token_s is None and _LONG not in self._outputs:
          done, _ = self._engine.progress(_LONG)
          bar.update(done - bar.n)
          lent = sum(map(sum, self._lent))
          bar.set_postfix_str(f"{lent:,} rBlocks lent", refresh=False)
        elif bar.n < total and self._first_token_s is not None:
          bar.update(total - bar.n)
    self._serve_s = time.perf_counter() - start_s
    # What is lent comes back by messages.
    deadline_s = time.perf_counter() + 5
    while self._num_leaked() and time.perf_counter() < deadline_s:
      self._engine.settle()

  def result(self) -> dict[str, object]:
    """What `result.json` says of the serving."""
    engine, use = self._engine, self._engine.use()
    output = self._outputs[_LONG]
    answer = document.read_answer(output.text)
    shorts = {n: o for n, o in self._outputs.items() if n != _LONG}
    num_right = sum(
      document.read_answer(short.text) == self._wanted[name].pass_keys
      for name, short in shorts.items()
    )
    creditors = [
      instance for instance, lent in enumerate(self._lent) if lent[_OWNER] > 0
    ]
    prefill_s = self._first_token_s
    decode_s = None if prefill_s is None else self._long_s - prefill_s
    return {
      "context_tokens": len(output.prompt_token_ids),
      "capacity_tokens_per_instance": engine.config.cache.capacity_tokens,
      "num_instances": self._num_instances,
      "block_size": engine.config.cache.block_size,
      "creditors": creditors,
      "blocks_lent": sum(lent[_OWNER] for lent in self._lent),
      "answer": list(answer),
      "expected": list(self._long.pass_keys),
      "answer_text": output.text,
      "correct": answer == self._long.pass_keys,
      "error": None if output.error is None else str(output.error),
      "num_short_requests": len(shorts),
      "short_requests_right": num_right,
      # None of none is neither right nor wrong.
      "short_requests_correct": num_right == len(shorts) if shorts else None,
      "blocks_leaked": self._num_leaked(),
      "books_correct": self._num_leaked() == 0,
      "blocks_moved": use.num_blocks_moved,
      "program_launches": dict(use.launches),
      "late_compiles": use.num_late_compiles,
      "prefill_s": prefill_s,
      "prefill_tokens_per_s": prefill_s
      and len(output.prompt_token_ids) / prefill_s,
      "decode_tokens_per_s": decode_s
      and (len(output.token_ids) - 1) / decode_s,
      "serve_s": self._serve_s,
      "blocks_per_instance": engine.config.cache.num_blocks - 1,
      "blocks_lent_by_to": self._lent,
      "instances": [dataclasses.asdict(use) for use in self._uses],
    }

  def _add(
    self, name: str, wanted: document.Document, instance: InstanceId
  ) -> None:
    self._wanted[name] = wanted
    max_tokens = len(wanted.answer_ids) + _SPARE_TOKENS
    self._engine.add_request(
      wanted.prompt_ids,
      SamplingParams(max_tokens=max_tokens),
      request_id=name,
      instance=instance,
    )
    self._uses[instance].requests += 1

  def _add_short(self, instance: InstanceId) -> None:
    number = len(self._wanted)
    tokenizer = self._llm.model.tokenizer
    short = _make_short(tokenizer, self._config, number=number)
    self._add(f"short-{number}", short, instance)

  def _take(self, output: RequestOutput, start_s: float) -> None:
    """Notes an output; a short request that ended makes room for another."""
    name = output.request_id
    now_s = time.perf_counter() - start_s
    if name == _LONG and output.token_ids and self._first_token_s is None:
      self._first_token_s = now_s
    if not output.is_finished:
      return
    self._outputs[name] = output
    use = self._uses[output.instance]
    use.prompt_tokens += len(output.prompt_token_ids)
    use.output_tokens += len(output.token_ids)
    if name == _LONG:
      self._long_s = now_s
    elif _LONG not in self._outputs:
      self._add_short(output.instance)

  def _observe(self) -> None:
    """Notes peaks, and the pools while the long request decodes."""
    now = self._engine.use().instances
    for use, lent, each in zip(self._uses, self._lent, now, strict=True):
      counts = each.counts
      mine = dict(each.lent)
      promised = sum(mine.values()) - counts.hosted
      own = counts.used + counts.reserved - promised
      use.peak_own = max(use.peak_own, own)
      use.peak_hosted = max(use.peak_hosted, counts.hosted)
      for debtor, count in mine.items():
        lent[debtor] = max(lent[debtor], count)
    if self._first_token_s is None or _LONG in self._outputs:
      return
    # The moment with the most short requests shows most. Looking at every
    # rBlock takes time, so it is done for few steps.
    num_running = sum(each.num_running for each in now)
    if self.block_map is None or num_running > len(self.block_map.holders):
      self.block_map = take_block_map(self._engine)

  def _num_leaked(self) -> int:
    return sum(c.total - c.free for c in self._engine.pool_counts())
