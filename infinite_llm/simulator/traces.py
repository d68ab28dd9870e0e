"""Which requests arrive when: drawn from a seed, or read from a file."""

import csv
import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Iterable, Mapping
from typing import Any, cast

from infinite_llm.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
  """One request of a trace.

  Attributes:
    arrival_s: When it arrives.
    prompt_tokens: Tokens of its prompt.
    output_tokens: Tokens that it will generate.
  """

  arrival_s: float
  prompt_tokens: int
  output_tokens: int

  def __post_init__(self):
    if not 0 <= self.arrival_s < math.inf:
      raise ConfigError(
        f"arrival_s must be finite and not negative; got {self.arrival_s!r}."
      )
    for name in ("prompt_tokens", "output_tokens"):
      value = getattr(self, name)
      if value < 1:
        raise ConfigError(f"{name} must be at least 1; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig:
  """A synthetic trace: Poisson arrivals, lengths over a wide range.

  Attributes:
    num_requests: How many.
    requests_per_s: How many a second, on average; infinite has all arrive at 0.
    min_tokens: Shortest context, prompt and output together.
    max_tokens: Longest context; lengths are drawn so that their logarithm is
      uniform: most are short, most tokens are in long ones.
    min_output_tokens: Fewest tokens to generate, at most half of the context.
    max_output_tokens: Most tokens to generate.
    seed: Equal seeds give equal traces.
  """

  num_requests: int = 1000
  requests_per_s: float = 10.0
  min_tokens: int = 1
  max_tokens: int = 200_000
  min_output_tokens: int = 64
  max_output_tokens: int = 512
  seed: int = 0

  def __post_init__(self):
    if self.num_requests < 1:
      raise ConfigError(
        f"num_requests must be at least 1; got {self.num_requests!r}."
      )
    if not self.requests_per_s > 0:
      raise ConfigError(
        f"requests_per_s must be positive; got {self.requests_per_s!r}."
      )
    if not 1 <= self.min_tokens <= self.max_tokens:
      raise ConfigError(
        f"min_tokens must be in [1, max_tokens = {self.max_tokens}]; got"
        f" {self.min_tokens!r}."
      )
    if not 1 <= self.min_output_tokens <= self.max_output_tokens:
      raise ConfigError(
        "min_output_tokens must be in [1, max_output_tokens ="
        f" {self.max_output_tokens}]; got {self.min_output_tokens!r}."
      )


def draw_trace(config: TraceConfig) -> tuple[TraceRequest, ...]:
  """Draws a trace: by rising arrival, the same for the same configuration."""
  rng = random.Random(config.seed)
  low, high = math.log(config.min_tokens), math.log(config.max_tokens)
  requests: list[TraceRequest] = []
  arrival_s = 0.0
  for _ in range(config.num_requests):
    if config.requests_per_s < math.inf:
      arrival_s += rng.expovariate(config.requests_per_s)
    context = max(round(math.exp(rng.uniform(low, high))), 2)
    output = rng.randint(config.min_output_tokens, config.max_output_tokens)
    output = min(output, context // 2)
    request = TraceRequest(
      arrival_s=arrival_s,
      prompt_tokens=context - output,
      output_tokens=output,
    )
    requests.append(request)
  return tuple(requests)


def load_trace(path: str | pathlib.Path) -> tuple[TraceRequest, ...]:
  """Reads a trace.

  Args:
    path: A `.csv` file with the columns `arrival_s`, `prompt_tokens` and
      `output_tokens`, or a `.json` file with a list of such objects.

  Returns:
    Its requests, by rising arrival.

  Raises:
    ConfigError: If it cannot be read; the message names the request.
  """
  path = pathlib.Path(path)
  records: Iterable[Mapping[str, Any]]
  try:
    text = path.read_text("utf-8")
    match path.suffix:
      case ".csv":
        records = list(csv.DictReader(text.splitlines()))
      case ".json":
        records = cast("list[dict[str, Any]]", json.loads(text))
      case suffix:
        raise ConfigError(f"path must end in .csv or .json; got {suffix!r}.")
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ConfigError(
      f"path must name a trace; got {str(path)!r} ({error!r})."
    ) from error
  requests: list[TraceRequest] = []
  for number, record in enumerate(records):
    try:
      request = TraceRequest(
        arrival_s=float(record["arrival_s"]),
        prompt_tokens=int(record["prompt_tokens"]),
        output_tokens=int(record["output_tokens"]),
      )
    except (ValueError, TypeError, KeyError) as error:
      raise ConfigError(
        f"Request {number} of {str(path)!r} must have arrival_s, prompt_tokens"
        f" and output_tokens; got {record!r} ({error!r})."
      ) from error
    requests.append(request)
  if not requests:
    raise ConfigError(f"path must name a trace with requests; got {path!s}.")
  return tuple(sorted(requests, key=lambda request: request.arrival_s))
