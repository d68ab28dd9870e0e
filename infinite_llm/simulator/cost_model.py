"""How long a step takes: the performance model, prefill, links and overhead.

Decoding is the performance model of the paper's second version,
`W(beta) / f(beta) + S / g(S)` a layer. A prefill program does the same work
`W` for its tokens, and its attention is counted in pairs of a query token and a
token that it attends. Instances that step together take the time of the slowest
one, and the exchange on top.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, cast

from infinite_llm.errors import ConfigError
from infinite_llm.scheduler.performance_model import (
  PerformanceModel,
  load_performance_model,
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Work:
  """What one instance does in a step.

  Attributes:
    rows: Rows that decode, one token each.
    tokens: Tokens that they attend here, hosted ones included.
    prefill_tokens: Prompt tokens that are computed.
    prefill_pairs: Pairs of a prompt token and one that it attends here.
    copied_s: Seconds of copies that the step has to wait for.
  """

  rows: int = 0
  tokens: float = 0.0
  prefill_tokens: int = 0
  prefill_pairs: float = 0.0
  copied_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
  """Seconds of steps and copies.

  Attributes:
    performance: Time of one layer.
    prefill_pairs_per_s: Pairs of prompt token and attended token per second of
      one layer.
    kv_bytes_per_token: KV of a token, all layers.
    query_bytes_per_token: What a token of a group prefill row sends and gets
      back in one layer: query, partial output and log-sum-exp.
    link_bytes_per_s: From one instance to another.
    host_bytes_per_s: Between HBM and pinned host memory.
    step_overhead_s: What a step takes beside its layers.
    reduce_s: Seconds of an all-reduce over the devices of an instance, beside
      those of its bytes.
    reduce_bytes_per_token: What is added up for each token.
    tensor_parallel: Devices of an instance, that all other figures are of.
  """

  performance: PerformanceModel
  prefill_pairs_per_s: float
  kv_bytes_per_token: float
  query_bytes_per_token: float
  link_bytes_per_s: float
  host_bytes_per_s: float
  step_overhead_s: float = 0.0
  reduce_s: float = 0.0
  reduce_bytes_per_token: float = 0.0
  tensor_parallel: int = 1

  def __post_init__(self):
    for name in (
      "prefill_pairs_per_s",
      "kv_bytes_per_token",
      "query_bytes_per_token",
      "link_bytes_per_s",
      "host_bytes_per_s",
    ):
      value = getattr(self, name)
      if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite; got {value!r}.")
    for name in ("step_overhead_s", "reduce_s", "reduce_bytes_per_token"):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ConfigError(
          f"{name} must be finite and not negative; got {value!r}."
        )

  def sharded(self, tensor_parallel: int) -> "CostModel":
    """The same for instances of several devices in place of one.

    Each layer is split evenly over them, and so are KV, copies and queries. Two
    all-reduces a layer put together what they computed.

    Args:
      tensor_parallel: Devices of each instance.

    Raises:
      ConfigError: If there are none, or the model is of several already.
    """
    if tensor_parallel < 1 or self.tensor_parallel != 1:
      raise ConfigError(
        "tensor_parallel must be at least 1, of a model of one device; got"
        f" {tensor_parallel!r} of a model of {self.tensor_parallel}."
      )
    speeds = {
      name: getattr(self, name) * tensor_parallel
      for name in (
        "prefill_pairs_per_s",
        "link_bytes_per_s",
        "host_bytes_per_s",
      )
    }
    return dataclasses.replace(
      self,
      performance=self.performance.sharded(tensor_parallel),
      tensor_parallel=tensor_parallel,
      **speeds,
    )

  def step_s(self, work: Work) -> float:
    """Seconds of one instance's part of a step; 0 if it has none."""
    model = self.performance
    layer_s = model.layer_s(work.rows, work.tokens)
    if work.prefill_tokens:
      layer_s += model.layer_s(work.prefill_tokens, 0)
    layer_s += work.prefill_pairs / self.prefill_pairs_per_s
    if self.tensor_parallel > 1:
      layer_s += self._reduces_s(work)
    busy_s = model.num_layers * layer_s + work.copied_s
    return busy_s + self.step_overhead_s if busy_s else 0.0

  def _reduces_s(self, work: Work) -> float:
    """Seconds of the two all-reduces of a layer, each round a ring."""
    # Each device sends this part of the bytes over a link of its own.
    sent = 2 * (self.tensor_parallel - 1) / self.tensor_parallel
    device_bytes_per_s = self.link_bytes_per_s / self.tensor_parallel
    token_s = sent * self.reduce_bytes_per_token / device_bytes_per_s
    programs = bool(work.rows) + bool(work.prefill_tokens)
    tokens = work.rows + work.prefill_tokens
    return 2 * (programs * self.reduce_s + tokens * token_s)

  def group_step_s(
    self, works: Sequence[Work], has_decode: bool, query_tokens: int
  ) -> float:
    """Seconds of a step that several instances take together.

    Args:
      works: What each of them does.
      has_decode: Whether rows with rBlocks elsewhere decode.
      query_tokens: Prompt tokens whose queries travel.

    Returns:
      The time of the slowest, and that of the exchanges.
    """
    model = self.performance
    layer_s = model.exchange_s * (has_decode + (query_tokens > 0))
    layer_s += query_tokens * self.query_bytes_per_token / self.link_bytes_per_s
    return max(map(self.step_s, works)) + model.num_layers * layer_s

  def move_s(self, num_tokens: int) -> float:
    """Seconds that the KV of some tokens takes to another instance."""
    return num_tokens * self.kv_bytes_per_token / self.link_bytes_per_s

  def prefill_tokens_per_s(self, chunk_tokens: int) -> float:
    """Speed at which a prompt of one chunk is computed."""
    pairs = chunk_tokens * (chunk_tokens + 1) / 2
    work = Work(prefill_tokens=chunk_tokens, prefill_pairs=pairs)
    return chunk_tokens / self.step_s(work)

  def swap_s(self, num_tokens: int) -> float:
    """Seconds that the KV of some tokens takes to host memory, or back."""
    return num_tokens * self.kv_bytes_per_token / self.host_bytes_per_s


def load_cost_model(path: str | pathlib.Path) -> CostModel:
  """Reads a cost model.

  Args:
    path: JSON object with the fields of `CostModel`; `performance` names the
      profile, a file beside this one. Fields that begin with an underscore tell
      where the numbers are from.

  Returns:
    The model.

  Raises:
    ConfigError: If a file cannot be read, or a value breaks its rule.
  """
  path = pathlib.Path(path)
  try:
    document = cast("dict[str, Any]", json.loads(path.read_text("utf-8")))
    fields = {k: v for k, v in document.items() if not k.startswith("_")}
    profile = path.parent / fields.pop("performance")
    return CostModel(performance=load_performance_model(profile), **fields)
  except ConfigError:
    raise
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f"path must name a cost model; got {str(path)!r} ({error!r})."
    ) from error
