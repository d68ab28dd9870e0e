"""What goes wrong in a simulated network, and how often."""

import dataclasses
import enum

from infinite_llm.errors import ConfigError


class Fault(enum.StrEnum):
  """What can go wrong; each is counted when it has happened to somebody.

  Attributes:
    LOST: A message never arrived.
    REPEATED: A message was to arrive twice.
    LATE: A message took longer than usual.
    OVERTAKEN: A message arrived after one that was sent later.
    CUT_OFF: A message was lost to a partition.
    UNHEARD: A message arrived at a crashed address.
    PARTITION: Two sides were parted.
    CRASH: An address went down.
    RESTART: An address came back.
    SKEW: A clock began to go wrong.
  """

  LOST = "lost"
  REPEATED = "repeated"
  LATE = "late"
  OVERTAKEN = "overtaken"
  CUT_OFF = "cut off"
  UNHEARD = "unheard"
  PARTITION = "partition"
  CRASH = "crash"
  RESTART = "restart"
  SKEW = "skew"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFaults:
  """How messages fare. No two of them wait for each other.

  Attributes:
    min_delay_s: Shortest way of a message.
    max_delay_s: Longest way of one that is not late; between the two, all are
      equally likely.
    lost: Probability that it never arrives.
    repeated: Probability that it arrives twice, each time on its own way.
    late: Probability that it is late, each time that it arrives.
    late_s: A late one takes up to so much longer.
  """

  min_delay_s: float = 0.001
  max_delay_s: float = 0.002
  lost: float = 0.0
  repeated: float = 0.0
  late: float = 0.0
  late_s: float = 1.0

  def __post_init__(self):
    if not 0 <= self.min_delay_s <= self.max_delay_s:
      raise ConfigError(
        "min_delay_s must be in [0, max_delay_s]; got"
        f" {self.min_delay_s} and {self.max_delay_s}."
      )
    for name in ("lost", "repeated", "late"):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(
          f"{name} must be a probability; got {getattr(self, name)}."
        )
    if self.late_s < 0:
      raise ConfigError(f"late_s must not be negative; got {self.late_s}.")
