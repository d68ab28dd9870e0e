"""How fast instances are: the performance model of the paper's second version.

One layer of an instance that runs a batch of `beta` requests and attends `S`
tokens takes `T(beta, S) = W(beta) / f(beta) + S / g(S)` seconds: `W` is all
work but attention, `f` the speed at which a batch of that size gets it done,
and `g` the speed of attention (arXiv 2401.02669v2, performance model).
`f` and `g` are profiled. The throughput of an instance is `beta / (L T)`.

Instances with rBlocks of each other's requests meet in every group step, so all
of them take the time of the slowest, and the exchange on top.
"""

import bisect
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from infinite_llm.errors import ConfigError
from infinite_llm.types import InstanceId


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
  """A measured curve: straight lines between points, flat outside of them.

  Attributes:
    at: Where it was measured: positive, rising.
    per_s: What was measured there: positive, work or tokens per second.
  """

  at: tuple[float, ...]
  per_s: tuple[float, ...]

  def __post_init__(self):
    for name in ("at", "per_s"):
      values = tuple(float(value) for value in getattr(self, name))
      object.__setattr__(self, name, values)
      if not values or not all(0 < value < math.inf for value in values):
        raise ConfigError(
          f"{name} must be positive, finite and not empty; got {values}."
        )
    if any(a >= b for a, b in itertools.pairwise(self.at)):
      raise ConfigError(f"at must be rising; got {self.at}.")
    if len(self.at) != len(self.per_s):
      raise ConfigError(
        f"per_s must have as many values as at ({len(self.at)}); got"
        f" {len(self.per_s)}."
      )

  def __call__(self, x: float) -> float:
    """The curve at one place."""
    right = bisect.bisect_left(self.at, x)
    if right == 0:
      return self.per_s[0]
    if right == len(self.at):
      return self.per_s[-1]
    x0, x1 = self.at[right - 1], self.at[right]
    y0, y1 = self.per_s[right - 1], self.per_s[right]
    return y0 + (y1 - y0) / (x1 - x0) * (x - x0)

  def times(self, factor: float) -> "Profile":
    """The same curve, so many times as fast."""
    return Profile(at=self.at, per_s=tuple(y * factor for y in self.per_s))

  def many(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve at many places."""
    return np.interp(x, self.at, self.per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceModel:
  """Time of a step, from batch and tokens.

  Attributes:
    num_layers: L.
    work_per_token: `W(1)`; `W(beta)` is `beta` times that.
    batch_speed: `f`, work per second by batch.
    attention_speed: `g`, tokens per second of one layer by tokens attended.
    exchange_s: What a group step adds to each layer: queries out, states back.
  """

  num_layers: int
  work_per_token: float
  batch_speed: Profile
  attention_speed: Profile
  exchange_s: float = 0.0

  def __post_init__(self):
    if self.num_layers < 1:
      raise ConfigError(
        f"num_layers must be at least 1; got {self.num_layers}."
      )
    if not 0 < self.work_per_token < math.inf:
      raise ConfigError(
        f"work_per_token must be positive and finite; got"
        f" {self.work_per_token!r}."
      )
    if not 0 <= self.exchange_s < math.inf:
      raise ConfigError(
        f"exchange_s must be finite and not negative; got {self.exchange_s!r}."
      )

    speed = self.attention_speed
    times_s = [
      at / per_s for at, per_s in zip(speed.at, speed.per_s, strict=True)
    ]
    if any(a > b for a, b in itertools.pairwise(times_s)):
      raise ConfigError(
        "attention_speed must not have more tokens take less time; got"
        f" {speed}."
      )

  def sharded(self, num_devices: int) -> "PerformanceModel":
    """The same if so many devices share each layer evenly."""
    return dataclasses.replace(
      self,
      batch_speed=self.batch_speed.times(num_devices),
      attention_speed=self.attention_speed.times(num_devices),
    )

  def layer_s(self, batch: int, tokens: float) -> float:
    """`T(beta, S)`: seconds of one layer, without any exchange.

    Args:
      batch: Requests that the instance runs.
      tokens: Tokens that it attends, its own requests' and hosted ones.
    """
    seconds = 0.0
    if batch:
      seconds += batch * self.work_per_token / self.batch_speed(batch)
    if tokens:
      seconds += tokens / self.attention_speed(tokens)
    return seconds

  def layers_s(
    self, batch: float | NDArray[np.float64], tokens: NDArray[np.float64]
  ) -> NDArray[np.float64]:
    """`layer_s` of many cases: `[n]` tokens, and batches or one batch."""
    speed = self.batch_speed
    per_s = speed.many(batch) if isinstance(batch, np.ndarray) else speed(batch)
    work = batch * self.work_per_token / per_s
    return work + tokens / self.attention_speed.many(tokens)

  def throughput(self, batch: int, layer_s: float) -> float:
    """`beta / (L T)`: tokens per second of a batch; 0 of none."""
    return batch / (self.num_layers * layer_s) if batch else 0.0


def load_performance_model(path: str | pathlib.Path) -> PerformanceModel:
  """Reads a profile.

  Args:
    path: JSON object with the fields of `PerformanceModel`; of each `Profile`
      an object with `at` and `per_s`. Fields that begin with an underscore
      tell where the numbers are from.

  Returns:
    The model.

  Raises:
    ConfigError: If the file cannot be read, or a value breaks its rule.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    document = cast("dict[str, Any]", json.loads(text))
    fields = {k: v for k, v in document.items() if not k.startswith("_")}
    for name in ("batch_speed", "attention_speed"):
      fields[name] = Profile(**fields[name])
    return PerformanceModel(**fields)
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f"path must name a performance profile; got {str(path)!r} ({error!r})."
    ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Load:
  """What one instance does in a step.

  Attributes:
    batch: Requests that it runs.
    tokens: Tokens that it attends.
  """

  batch: int
  tokens: float


def coupled(
  instances: Iterable[InstanceId],
  debts: Iterable[tuple[InstanceId, InstanceId]],
) -> dict[InstanceId, InstanceId]:
  """Finds out who steps together.

  Args:
    instances: All of them.
    debts: Pairs of which one holds rBlocks of the other's requests.

  Returns:
    For each instance the lowest one that it is joined to, directly or through
    others: equal numbers step together.
  """
  root = {instance: instance for instance in instances}

  def find(instance: InstanceId) -> InstanceId:
    while root[instance] != instance:
      root[instance] = root[root[instance]]
      instance = root[instance]
    return instance

  for a, b in debts:
    low, high = sorted((find(a), find(b)))
    root[high] = low
  return {instance: find(instance) for instance in root}


def cluster_throughput(
  model: PerformanceModel,
  loads: Mapping[InstanceId, Load],
  debts: Sequence[tuple[InstanceId, InstanceId]],
) -> float:
  """Tokens per second of all instances together.

  Args:
    model: How fast they are.
    loads: What each of them does.
    debts: Pairs of which one holds rBlocks of the other's requests.

  Returns:
    The sum of `beta / (L T)`, where `T` is that of the slowest instance that
    each is coupled to.
  """
  groups: dict[InstanceId, list[InstanceId]] = {}
  for instance, root in coupled(loads, debts).items():
    groups.setdefault(root, []).append(instance)
  total = 0.0
  for members in groups.values():
    slowest_s = max(
      model.layer_s(loads[i].batch, loads[i].tokens) for i in members
    )
    if len(members) > 1:
      slowest_s += model.exchange_s
    total += model.throughput(sum(loads[i].batch for i in members), slowest_s)
  return total
