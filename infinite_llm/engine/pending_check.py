"""A coverage check under way: what was asked, and what the answer is about."""

import dataclasses
from collections.abc import Sequence

import jax

from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.types import RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A request whose moved rBlocks are being proved.

  Attributes:
    uid: The request.
    slot: Its spill slot, which is its row.
    names: What it was named by when the check was launched; a proof of what it
      was then says nothing once that has changed.
  """

  uid: RequestUid
  slot: int
  names: tuple[object, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingCheck:
  """A coverage check under way: answers and questions of each instance."""

  proved: Sequence[jax.Array]
  asked: Sequence[Sequence[Asked]]


def names_of(manager: RManager, uid: RequestUid) -> tuple[object, ...]:
  """Changes whenever an rBlock of a request is named elsewhere."""
  entries = manager.table(uid).local_entries()
  return manager.spill(uid), entries.log, entries.begin
