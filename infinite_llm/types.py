"""Plain types shared by all packages. Imports nothing of the project."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Annotated, dataclass_transform


@dataclass_transform(kw_only_default=True, frozen_default=True)
def value_type[T](cls: type[T]) -> type[T]:
  """Makes a class a keyword-only dataclass of values that nobody changes.

  The type checker refuses assignments to fields, as those of a frozen
  dataclass. A frozen one refuses them at run time too, and takes four times as
  long to make one; messages, reports and rows are made by the ten thousand a
  second. What is made once, such as a configuration, is frozen.
  """
  return dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)(cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
  """Integers that a type allows; messages from elsewhere are held to it.

  Attributes:
    low: The smallest.
    high: The largest.
  """

  low: int
  high: int


@dataclasses.dataclass(frozen=True)
class AnyCharacters:
  """Marks strings that may have any characters; others are names, in ASCII."""


# What people write and models answer.
Text = Annotated[str, AnyCharacters()]
# Position of an instance on the mesh axis "instance".
InstanceId = Annotated[int, Range(low=0, high=2**31 - 1)]
# How many places after its sender, on that axis, an instance receives.
Shift = Annotated[int, Range(low=1, high=2**31 - 1)]
# rBlocks that an exchange carries from each instance, however few are real.
Quota = Annotated[int, Range(low=1, high=2**31 - 1)]
# Non-zero uint32, never used twice in a lending group.
RequestUid = Annotated[int, Range(low=1, high=2**32 - 1)]
# Index of an rBlock in its instance's pool.
BlockId = Annotated[int, Range(low=0, high=2**31 - 1)]
# Reservation epoch of an rBlock: uint32; that of a grant is not zero.
Epoch = Annotated[int, Range(low=0, high=2**32 - 1)]

type FaultPoint = Callable[[str], bool]
"""Asked at a named point whether a simulation has something go wrong there."""

INSTANCE_AXIS = "instance"
"""Mesh axis over instances: one row of the mesh is one model replica."""

TENSOR_AXIS = "tensor"
"""Mesh axis over the tensor-parallel shards of an instance."""

NULL_BLOCK_ID: BlockId = 0
"""rBlock 0 of every pool: padding points there, nobody ever owns it."""

NO_EPOCH: Epoch = 0
"""Epoch of an rBlock that nobody holds; no grant ever carries it."""


class Tier(enum.Enum):
  """Where an rBlock lies."""

  HBM = "hbm"
  HOST = "host"


@value_type
class PoolCounts:
  """How the rBlocks of one instance are used, in blocks, without the null one.

  Attributes:
    used: Hold KV of the instance's own requests (also while being moved).
    free: Held by nobody.
    hosted: Hold KV for other instances.
    reserved: Promised, to own requests or to others, but not yet filled.
    total: All of them.
  """

  used: int
  free: int
  hosted: int
  reserved: int
  total: int

  def is_conserved(self) -> bool:
    """Whether every rBlock is counted once."""
    return self.used + self.free + self.hosted + self.reserved == self.total
