"""Which group programs all processes launch next, and with what shapes.

The processes of a lending group take *turns* together. The header of a turn is
a ceiling that they agreed on before: all launch just its programs, in one
order, whether they have anything for them or not. What does not fit waits for
the next turn (`DESIGN.md` section 3).
"""

import dataclasses
import itertools
import math
from typing import Protocol

from infinite_llm.types import Quota, Shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWork:
  """Group programs, in the order in which a turn launches them.

  Attributes:
    exchange: `(shift, quota)` by ascending shift: as many rBlocks may move from
      each instance i to i + shift. Each is a program of its own, so that no
      device has to ask what is needed.
    check: Moved rBlocks are proved.
    decode: A decode step.
    prefill_tokens: Query tokens of a prefill step, a bucket; 0 is no step.
    layered_tokens: Likewise of a step that attends HOST.
  """

  exchange: tuple[tuple[Shift, Quota], ...] = ()
  check: bool = False
  decode: bool = False
  prefill_tokens: int = 0
  layered_tokens: int = 0

  def __post_init__(self):
    """Refuses exchanges without room, or not in the order of all processes."""
    shifts = (0, *(shift for shift, _ in self.exchange))
    if not all(a < b for a, b in itertools.pairwise(shifts)):
      raise ValueError(
        f"exchange must have ascending shifts, from 1 on; got {self.exchange}."
      )
    if not all(quota >= 1 for _, quota in self.exchange):
      raise ValueError(
        f"exchange must have quotas of at least 1; got {self.exchange}."
      )

  def __bool__(self) -> bool:
    return self != NO_WORK

  @property
  def has_steps(self) -> bool:
    """Whether any of it is a step."""
    return self.decode or self.prefill_tokens > 0 or self.layered_tokens > 0

  def __or__(self, other: "GroupWork") -> "GroupWork":
    """The smallest ceiling above both: of two quotas the larger one."""
    if not other:
      return self
    quotas = dict(self.exchange)
    for shift, quota in other.exchange:
      quotas[shift] = max(quota, quotas.get(shift, quota))
    return GroupWork(
      exchange=tuple(sorted(quotas.items())),
      check=self.check or other.check,
      decode=self.decode or other.decode,
      prefill_tokens=max(self.prefill_tokens, other.prefill_tokens),
      layered_tokens=max(self.layered_tokens, other.layered_tokens),
    )


NO_WORK = GroupWork()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepHeader:
  """A turn that is agreed.

  Attributes:
    number: Turns are numbered from 1 on; all processes take all of them.
    work: What is launched at most; just that where it is shared.
    is_shared: Whether other processes take it too, and wait for this one.
  """

  number: int
  work: GroupWork
  is_shared: bool


class GroupOrder(Protocol):
  """Agrees with the other processes on the next turn.

  Attributes:
    patience_s: How long a turn's steps may take; longer is a fault.
  """

  patience_s: float

  @property
  def is_shared(self) -> bool:
    """Whether there are other processes."""
    ...

  @property
  def next_number(self) -> int:
    """Number of the first turn that this process has not taken."""
    ...

  @property
  def is_called(self) -> bool:
    """Whether the next turn is agreed once all processes are ready for it."""
    ...

  def ask(self, work: GroupWork) -> None:
    """Says what this process has for the next turn, as far as it knows."""
    ...

  def ready(self) -> None:
    """Says that this process can begin the turn that is called.

    It has nothing under way that takes longer than a decode step, and launches
    no such thing before it takes that turn.
    """
    ...

  def next(self) -> StepHeader | None:
    """The next turn if it is agreed; the same one until it is taken."""
    ...

  def take(self, turn: StepHeader) -> None:
    """Notes that the programs of a turn are being launched."""
    ...

  def has_call(self) -> bool:
    """Whether other processes want something of this one; never waits."""
    ...


class OwnOrder:
  """The order of a process that is alone.

  It calls a turn with steps for its own instances, and is ready when it says
  so; what else there is can be had at once.
  """

  def __init__(self, prefill_tokens: int):
    """Begins with turn 1.

    Args:
      prefill_tokens: Largest bucket of a group prefill step.
    """
    self.is_shared = False
    self.patience_s = math.inf
    self.next_number = 1
    self._work = GroupWork(
      check=True, decode=True, prefill_tokens=prefill_tokens
    )
    self._has_steps = False
    self._is_ready = False

  def ask(self, work: GroupWork) -> None:
    """Needs to know which exchanges there are, and whether there are steps."""
    self._work = dataclasses.replace(self._work, exchange=work.exchange)
    self._has_steps = work.has_steps

  @property
  def is_called(self) -> bool:
    """Whether some instance has a group step, and others are not ready."""
    return self._has_steps and not self._is_ready

  def ready(self) -> None:
    """Says that its instances can begin the turn that is called."""
    self._is_ready = True

  def next(self) -> StepHeader | None:
    """A turn with everything, of exchanges those that were asked for.

    What nobody has anything for is left out. None if one is called.
    """
    if self.is_called:
      return None
    return StepHeader(number=self.next_number, work=self._work, is_shared=False)

  def take(self, turn: StepHeader) -> None:
    """Goes on to the next."""
    self.next_number = turn.number + 1
    self._is_ready = False

  def has_call(self) -> bool:
    """Nobody else is there."""
    return False
