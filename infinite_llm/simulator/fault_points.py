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
from infinite_llm.scheduler.fault_points import Mishap
from infinite_llm.scheduler.messages import Address
from infinite_llm.types import FaultPoint

_DEATHS = (Mishap.DEATH_BEFORE_ANSWER, Mishap.DEATH_WHILE_SENDING)


class DeathError(Exception):
  """Somebody dies in the midst of what it does.

  Attributes:
    address: Who.
  """

  def __init__(self, address: Address, point: str):
    """Says who dies where."""
    super().__init__(f"{address!r} died: {point}.")
    self.address: Address = address


class FaultPoints:
  """Lets things go wrong by chance, and counts them."""

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
    self._counts: collections.Counter[str] = collections.Counter()

  def at(self, address: Address) -> FaultPoint:
    """The points inside of one manager.

    Args:
      address: Whose they are.

    Returns:
      Says whether something goes wrong this time; raises a `DeathError` where
      somebody dies.
    """
    probabilities = self._probabilities

    def goes_wrong(point: str) -> bool:
      probability = probabilities.get(point)
      if probability is None or self._random() >= probability:
        return False
      self._counts[point] += 1
      if point in _DEATHS:
        raise DeathError(address, point)
      return True

    return goes_wrong

  def end(self) -> None:
    """Nothing goes wrong from now on."""
    self._probabilities.clear()

  def counts(self) -> dict[str, int]:
    """How often something went wrong at each point."""
    return {str(point): count for point, count in self._counts.items()}
