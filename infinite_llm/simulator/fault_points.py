"""Faults at named points inside the code.

Code that can be disturbed takes a `FaultPoint` where it is built, and asks it
where something may go wrong; `scheduler/fault_points.py` names the managers'
places and has the `no_fault` that they get outside of simulations. There is
nothing global: two managers may be disturbed differently.
"""

import collections
import random
from collections.abc import Mapping

from infinite_llm.errors import ConfigError


class FaultPoints:
  """A `FaultPoint` that lets things go wrong by chance, and counts them."""

  def __init__(self, rng: random.Random, probabilities: Mapping[str, float]):
    """Makes all points ready.

    Args:
      rng: Decides what happens.
      probabilities: How often each point goes wrong when it is passed; others
        never do.

    Raises:
      ConfigError: If one is no probability.
    """
    for point, probability in probabilities.items():
      if not 0 <= probability <= 1:
        raise ConfigError(
          f"{point!r} must be a probability; got {probability}."
        )
    self._random = rng.random
    self._probabilities = dict(probabilities)
    self._passed: set[str] = set()
    self._counts: collections.Counter[str] = collections.Counter()

  def __call__(self, point: str) -> bool:
    """Whether something goes wrong at a point this time."""
    self._passed.add(point)
    if self._random() >= self._probabilities.get(point, 0.0):
      return False
    self._counts[point] += 1
    return True

  def counts(self) -> dict[str, int]:
    """How often something went wrong at each point."""
    return dict(self._counts)

  def never_passed(self) -> tuple[str, ...]:
    """Points with a probability that no code has asked for: misspelled ones."""
    return tuple(sorted(self._probabilities.keys() - self._passed))
