"""Answers a file of requests; killed at any time, it goes on where it was."""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import tqdm

from experiments.cluster import build_llm
from infinite_llm import LLM, SamplingParams
from infinite_llm.config import engine_config
from infinite_llm.distributed.group_messages import EngineUse
from infinite_llm.engine.admission import derived_seed
from infinite_llm.engine.journal import Accepted, Journal
from infinite_llm.errors import CapacityError, ConfigError, RequestError
from infinite_llm.models.needle import build_needle_checkpoint

_SETTLE_S = 5.0
_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, object]:
  """Runs the batch.

  Args:
    config: As in `configs/batch.py`.
    workdir: Has `journal.jsonl`; gets `outputs.jsonl`.

  Returns:
    What `result.json` is to hold.

  Raises:
    ConfigError: If the file cannot be read.
    RequestError: If a line of it is no request; then none is run.
  """
  if config.requests.num_in_flight < 1:
    raise ConfigError(
      "requests.num_in_flight must be at least 1; got"
      f" {config.requests.num_in_flight}."
    )
  lines = _read(config.requests.path)
  checkpoint = config.model.path or build_needle_checkpoint(
    workdir / "checkpoint"
  )
  llm = build_llm(
    checkpoint,
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
  requests = [
    _request(llm, number, line, config.seed)
    for number, line in enumerate(lines, start=1)
  ]
  _check_names(requests)
  start_s = time.perf_counter()
  with Journal(workdir / "journal.jsonl", _settings(config)) as journal:
    for number, request in enumerate(requests, start=1):
      if not journal.has(request):
        _check(llm, number, request)
    num_replayed = len(journal.unfinished)
    num_before = len(journal.ended)
    _serve(llm, journal, requests, config)
    _write_outputs(journal, requests, workdir / "outputs.jsonl")
    ended = [journal.ended[request.request_id] for request in requests]
  wall_s = time.perf_counter() - start_s
  use = _settled(llm)
  reasons = collections.Counter(each.finish_reason for each in ended)
  num_tokens = sum(len(each.token_ids) for each in ended)
  print(f"{len(ended)} requests, {num_tokens:,} tokens: {dict(reasons)}")
  return {
    "num_requests": len(ended),
    "num_ended_before": num_before,
    "num_replayed": num_replayed,
    "finish_reasons": dict(reasons),
    "output_tokens": num_tokens,
    "serve_s": wall_s,
    "num_instances": config.cluster.num_instances,
    "blocks_moved": use.num_blocks_moved,
    "late_compiles": use.num_late_compiles,
    "program_launches": dict(use.launches),
    "messages_refused": use.num_refused,
    "messages_void": use.num_void,
    "plans_declined": use.num_declined,
    "books_correct": all(
      each.counts.total == each.counts.free for each in use.instances
    ),
  }


def _read(path: str | None) -> list[dict[str, Any]]:
  """The lines of the file of requests.

  Raises:
    ConfigError: If there is none, or it cannot be read.
    RequestError: If a line is no JSON object.
  """
  if path is None:
    raise ConfigError("requests.path must name a file of requests; got None.")
  try:
    texts = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"requests.path must be a readable UTF-8 file; got {path!r} ({error})."
    ) from error
  lines = []
  for number, text in enumerate(texts, start=1):
    try:
      line = json.loads(text)
    except ValueError as error:
      raise RequestError(
        f"Line {number} must be a JSON object; got {text[:80]!r} ({error})."
      ) from error
    if not isinstance(line, dict) or "prompt" not in line:
      raise RequestError(
        f"Line {number} must be an object with a prompt; got {text[:80]!r}."
      )
    unknown = line.keys() - _FIELDS - {"prompt", "request_id"}
    if unknown:
      raise RequestError(
        f"Line {number} must have fields of SamplingParams only; got"
        f" {sorted(unknown)}."
      )
    lines.append(line)
  if not lines:
    raise ConfigError(f"requests.path must have a request; {path!r} has none.")
  return lines


def _request(
  llm: LLM, number: int, line: dict[str, Any], seed: int
) -> Accepted:
  """A line as a request."""
  options = {name: line[name] for name in line.keys() & _FIELDS}
  options.setdefault("seed", derived_seed(seed, number))
  try:
    sampling = SamplingParams(**options)
    prompt = llm.tokenize(line["prompt"])
  except ValueError as error:
    raise RequestError(f"Line {number}: {error}") from error
  return Accepted(
    request_id=str(line.get("request_id", f"line-{number}")),
    prompt_token_ids=tuple(prompt),
    sampling=sampling,
  )


def _settings(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What all answers depend on, however many instances there are."""
  path = config.model.path
  fields = {
    "model.path": path and str(pathlib.Path(path).resolve()),
    "model.dtype": config.model.dtype,
    "cache.kv_dtype": config.cache.kv_dtype,
    "cache.kv_scales": config.cache.kv_scales,
  }
  return {name: repr(value) for name, value in fields.items()}


def _check(llm: LLM, number: int, request: Accepted) -> None:
  try:
    llm.engine.check(request.prompt_token_ids, request.sampling)
  except RequestError as error:
    raise RequestError(f"Line {number}: {error}") from error


def _check_names(requests: list[Accepted]) -> None:
  counts = collections.Counter(request.request_id for request in requests)
  name, count = counts.most_common(1)[0]
  if count > 1:
    raise RequestError(
      f"request_id must be unique; {name!r} is that of {count} lines."
    )


def _serve(
  llm: LLM,
  journal: Journal,
  requests: list[Accepted],
  config: ml_collections.ConfigDict,
) -> None:
  """Runs what has not ended, by the journal."""
  waiting = _owed(journal, requests)
  engine, is_over = llm.engine, False
  with tqdm.tqdm(
    total=len(requests),
    initial=len(journal.ended),
    desc="Requests",
    unit="request",
    disable=not config.show_progress,
  ) as bar:
    num_running = 0
    while not is_over or num_running:
      while not is_over and num_running < config.requests.num_in_flight:
        request = next(waiting, None)
        if request is None:
          is_over = True
          break
        try:
          engine.add_request(
            request.prompt_token_ids,
            request.sampling,
            request_id=request.request_id,
          )
        except CapacityError as error:
          # It was accepted by a group that had more instances.
          journal.fail(request.request_id, error)
          bar.update()
        else:
          num_running += 1
      for output in engine.step():
        if output.is_finished:
          journal.end(output)
          num_running -= 1
          bar.update()


def _settled(llm: LLM) -> EngineUse:
  """What was done; what is lent comes home by messages, so that takes a bit."""
  deadline_s = time.monotonic() + _SETTLE_S
  use = llm.engine.use()
  while time.monotonic() < deadline_s and any(
    each.counts.total != each.counts.free for each in use.instances
  ):
    llm.engine.settle()
    use = llm.engine.use()
  return use


def _owed(journal: Journal, requests: list[Accepted]) -> Iterator[Accepted]:
  """Requests without an answer: those accepted before, then the others."""
  yield from journal.unfinished
  for request in requests:
    if request.request_id not in journal.accepted:
      journal.accept(request)
      yield request


def _write_outputs(
  journal: Journal, requests: list[Accepted], path: pathlib.Path
) -> None:
  new = path.with_suffix(".new")
  with new.open("w", encoding="utf-8") as file:
    for request in requests:
      ended = journal.ended[request.request_id]
      file.write(json.dumps(dataclasses.asdict(ended)) + "\n")
  new.replace(path)
