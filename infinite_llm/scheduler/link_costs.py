"""What it costs to move an rBlock between two instances."""

import dataclasses
import math

from infinite_llm.errors import ConfigError
from infinite_llm.types import InstanceId


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkCosts:
  """Links of a cluster: fast ones inside a domain, one kind between domains.

  Attributes:
    domains: Domain of each instance, from instance 0 on, by any number. The
      instances beyond it share a domain with nobody; the default puts all
      instances into one.
    within_s: Seconds that an rBlock takes inside a domain.
    between_s: Seconds that it takes between domains; infinite if instances of
      different domains cannot read each other's rBlocks, as those of different
      lending groups cannot.
  """

  domains: tuple[int, ...] | None = None
  within_s: float = 0.0
  between_s: float = math.inf

  def __post_init__(self):
    # Written so that NaN is refused too.
    if not 0 <= self.within_s < math.inf:
      raise ConfigError(
        f"within_s must be finite and not negative; got {self.within_s!r}."
      )
    if not self.between_s >= self.within_s:
      raise ConfigError(
        f"between_s must be at least within_s ({self.within_s!r}); got"
        f" {self.between_s!r}."
      )

  def domain(self, instance: InstanceId) -> tuple[int, InstanceId | None]:
    """Name of an instance's domain; equal names mean a fast link."""
    if self.domains is None:
      return 0, None
    if instance < len(self.domains):
      return self.domains[instance], None
    return 0, instance

  def cost_s(self, a: InstanceId, b: InstanceId) -> float:
    """Seconds that an rBlock takes from one instance to another."""
    return self.within_s if self.domain(a) == self.domain(b) else self.between_s
