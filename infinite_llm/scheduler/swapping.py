"""How preempted requests wait in the HOST tier, step by step.

On the way out: reserve HOST rBlocks, have the proved full rBlocks copied there,
free those in HBM. On the way in: reserve HBM, have them copied back, let the
request's next step prove them, free those in HOST. Books change when the data
plane acknowledges a copy; until then neither end of it belongs to anybody else,
for a late write has no reservation epoch that would refuse it.

Only requests that are wholly at home wait there. KV serves as a prefix only,
and what lies with creditors is the oldest part: to keep it leased would take
room from others for a request that does not run, and without it the rest is
worth nothing. So such a request gives its leases back and is computed again.
"""

import dataclasses
import enum
from collections.abc import Collection

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import ConfigError, InvariantError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.effects import (
  Effect,
  Swap,
  SwapBlocks,
  swap_blocks,
)
from infinite_llm.scheduler.fault_points import Mishap, Place
from infinite_llm.scheduler.overflow import OverflowRule
from infinite_llm.scheduler.swap_costs import SwapCosts
from infinite_llm.types import FaultPoint, PoolCounts, RequestUid, Tier

_NO_COUNTS = PoolCounts(used=0, free=0, hosted=0, reserved=0, total=0)


class Stage(enum.Enum):
  """What is under way with a request that has rBlocks in HOST.

  It goes LEAVING, WAITING, ENTERING, UNPROVED, and is forgotten when proved. If
  preempted again before that, it keeps its HOST rBlocks: UNPROVED goes to
  WAITING at once, ENTERING by way of RETREATING. One that ends while a copy is
  under way is DROPPED until that is acknowledged.
  """

  LEAVING = "awaiting copies to HOST"
  WAITING = "awaiting room in HBM"
  ENTERING = "awaiting copies to HBM"
  UNPROVED = "awaiting the proof of the copies in HBM"
  RETREATING = "awaiting the end of copies to HBM that are not wanted"
  DROPPED = "awaiting the end of copies that nobody wants"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostTier:
  """Host memory of an instance, and what its use costs.

  Attributes:
    pool: Its rBlocks.
    costs: Of copies to it and back.
    overflow: Which requests keep rBlocks there while they run; None if none.
  """

  pool: BlockPool
  costs: SwapCosts
  overflow: OverflowRule | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class _Swapped:
  """A request with rBlocks in HOST.

  Attributes:
    uid: The request.
    stage: What is under way.
    home: Its first rBlocks in HBM, full ones; empty while it has none.
    host: The same in HOST.
  """

  uid: RequestUid
  stage: Stage
  home: tuple[Location, ...]
  host: tuple[Location, ...]


class Swapping:
  """Keeps the books of what lies in one instance's HOST tier."""

  def __init__(
    self,
    debtor: Debtor,
    pool: BlockPool,
    host: HostTier | None,
    block_size: int,
    faults: FaultPoint,
  ):
    """Makes the books of an instance that has nothing in HOST.

    Args:
      debtor: Keeps the accounts of requests that run.
      pool: The instance's HBM.
      host: Its host memory; None if it has none.
      block_size: P, tokens per rBlock.
      faults: What goes wrong.

    Raises:
      ConfigError: If `host` is of another instance or another tier.
    """
    if host is not None and (
      (host.pool.instance, host.pool.tier) != (pool.instance, Tier.HOST)
    ):
      raise ConfigError(
        f"host must be the HOST pool of instance {pool.instance}; got the"
        f" {host.pool.tier.name} pool of instance {host.pool.instance}."
      )
    self._faults = faults
    self._debtor = debtor
    self._pool = pool
    self._host = host
    self._block_size = block_size
    self._swapped: dict[RequestUid, _Swapped] = {}
    # By the first copy of each: its tags tell it from any other.
    self._under_way: dict[Swap, _Swapped] = {}
    self._effects: list[Effect] = []

  @property
  def is_making_room(self) -> bool:
    """Whether rBlocks in HBM become free when copies are acknowledged."""
    return any(
      swapped.stage is not Stage.ENTERING
      for swapped in self._under_way.values()
    )

  def counts(self) -> PoolCounts:
    """How the HOST rBlocks are used."""
    return _NO_COUNTS if self._host is None else self._host.pool.counts()

  @property
  def num_changes(self) -> int:
    """Rises with every change of a HOST rBlock."""
    return 0 if self._host is None else self._host.pool.num_changes

  @property
  def is_conserved(self) -> bool:
    """Whether every HOST rBlock is counted once."""
    return self._host is None or self._host.pool.is_conserved

  def stage(self, uid: RequestUid) -> Stage | None:
    """What is under way with a request; None if it has nothing in HOST."""
    swapped = self._swapped.get(uid)
    return swapped.stage if swapped else None

  def check_absent(self, uid: RequestUid) -> None:
    """Refuses to have a request begin that has something in HOST."""
    if uid in self._swapped:
      raise InvariantError(
        f"Request {uid} has rBlocks in HOST on instance {self._pool.instance};"
        " they come in or are dropped first."
      )

  def is_preferred(self, uid: RequestUid) -> bool:
    """Whether a request had better wait in HOST than be computed again.

    Args:
      uid: An open request.
    """
    if self._host is None:
      return False
    if uid in self._swapped:  # What is still there needs no copy.
      return True
    num_blocks = self._num_full(uid)
    return self._host.costs.swap_is_faster(
      num_blocks, num_blocks * self._block_size
    )

  def swap_out(self, uid: RequestUid) -> bool:
    """Closes a request and keeps its proved full rBlocks in HOST.

    Those in HBM are free when the copies are acknowledged, all others at once.
    If they fill HBM, the last one is given up: back there, the step that proves
    them needs an rBlock to write to, and until then none of them can move.

    Args:
      uid: An open request.

    Returns:
      Whether it was done. False, and nothing changed, if the request is busy,
      has rBlocks elsewhere or no full one, and if HOST has no room for it.
    """
    swapped = self._swapped.get(uid)
    if swapped is not None:
      self._return_to_host(swapped)
      return True
    account = self._debtor.account(uid)
    num_blocks = min(self._num_full(uid), self._pool.counts().total - 1)
    if self._host is None or not num_blocks or not account.can_leave():
      return False
    if self._faults(Mishap.SWAP_FAILS):
      return False
    host = self._host.pool.allocate(num_blocks, uid)
    if host is None:
      return False
    home = tuple(account.table.location(i) for i in range(num_blocks))
    for location in home:
      self._pool.begin_move(location.block_id)
    self._debtor.close(uid, kept=range(num_blocks))
    swapped = _Swapped(uid=uid, stage=Stage.LEAVING, home=home, host=host)
    self._swapped[uid] = swapped
    self._copy(swapped, home, host)
    if self._faults(Place.HOME_FREED_EARLY):
      self._free_home(swapped)
    return True

  def swap_in(self, uid: RequestUid, *, spare: int = 0) -> int | None:
    """Opens a request that waits in HOST, to go on from where it was.

    It is readable once the copies are acknowledged. Its next step proves them:
    `on_proved` then frees those in HOST, and `drop` if the proof fails.

    Args:
      uid: A request with rBlocks in HOST.
      spare: rBlocks of HBM that must be free beside its own.

    Returns:
      Tokens that need not be computed again; None if it cannot come now,
      because HBM has no room for its rBlocks or they are still being copied.
    """
    swapped = self._current(uid)
    if swapped.stage is not Stage.WAITING:
      return None
    if self._pool.num_free < len(swapped.host) + spare:
      return None
    home = self._pool.allocate(len(swapped.host), uid)
    if home is None:
      return None
    self._debtor.open(uid).append(home)
    self._debtor.account(uid).phase = Phase.SWAPPING_IN
    for location in swapped.host:
      self.host_pool.begin_move(location.block_id)
    swapped.home = home
    swapped.stage = Stage.ENTERING
    self._copy(swapped, swapped.host, home)
    return len(home) * self._block_size

  def on_swapped(self, effect: SwapBlocks) -> None:
    """Notes that the data plane copied all rBlocks of an effect, or tried to.

    Raises:
      InvariantError: If no such copies are under way.
    """
    swapped = self._under_way.pop(effect.swaps[0], None)
    if swapped is None:
      raise InvariantError(
        f"No copies to {effect.to_tier.name} like these are under way on"
        f" instance {self._pool.instance}: {effect.swaps[:1]}."
      )
    match swapped.stage:
      case Stage.LEAVING:
        self._free_home(swapped)
        for location in swapped.host:
          self.host_pool.mark_live(location.block_id)
        swapped.stage = Stage.WAITING
      case Stage.ENTERING:
        self._debtor.account(swapped.uid).phase = Phase.SWAPPED_IN
        swapped.stage = Stage.UNPROVED
      case Stage.RETREATING:
        self._free_home(swapped)
        self._await_room(swapped)
      case Stage.DROPPED:
        self._free_home(swapped)
        self._free_host(swapped)
      case Stage.WAITING | Stage.UNPROVED:
        raise InvariantError(
          f"Request {swapped.uid} is {swapped.stage.value}, so no copy of it"
          " can end."
        )

  def on_proved(self, uid: RequestUid) -> None:
    """Frees HOST rBlocks of a request whose copies in HBM a step proved."""
    swapped = self._swapped.pop(uid, None)
    if swapped is None:
      return
    if not self._faults(Place.HOST_KEPT):
      self._free_host(swapped)
    self._debtor.account(uid).phase = Phase.IDLE

  def drop(self, uid: RequestUid) -> Collection[int]:
    """Gives up what a request has in HOST, if it has anything there.

    Returns:
      Logical numbers of rBlocks that, if it is open, are still being written
      to: they are not to be freed with the others.
    """
    swapped = self._swapped.pop(uid, None)
    if swapped is None:
      return ()
    is_entering = swapped.stage is Stage.ENTERING
    is_early = self._faults(Place.DROPPED_EARLY)
    if is_early or swapped.stage in (Stage.WAITING, Stage.UNPROVED):
      self._free_host(swapped)
    if swapped.stage not in (Stage.WAITING, Stage.UNPROVED):
      swapped.stage = Stage.DROPPED
    return range(len(swapped.home)) if is_entering else ()

  def drain_effects(self) -> list[Effect]:
    """Takes what the data plane is to do now, in order."""
    effects, self._effects = self._effects, []
    return effects

  @property
  def host_pool(self) -> BlockPool:
    """Books of the HOST rBlocks.

    Raises:
      InvariantError: If the instance has none.
    """
    if self._host is None:
      raise InvariantError(f"Instance {self._pool.instance} has no HOST pool.")
    return self._host.pool

  def _current(self, uid: RequestUid) -> _Swapped:
    if uid not in self._swapped:
      raise InvariantError(
        f"Request {uid} has nothing in HOST on instance {self._pool.instance}."
      )
    return self._swapped[uid]

  def _num_full(self, uid: RequestUid) -> int:
    """Proved full rBlocks of an open request."""
    return self._debtor.account(uid).num_proved_tokens // self._block_size

  def _return_to_host(self, swapped: _Swapped) -> None:
    """Takes a request out again whose HOST rBlocks are still there."""
    if swapped.stage is Stage.ENTERING:
      swapped.stage = Stage.RETREATING
      self._debtor.close(swapped.uid, kept=range(len(swapped.home)))
    elif swapped.stage is Stage.UNPROVED:
      self._debtor.close(swapped.uid)
      self._await_room(swapped)
    else:
      raise InvariantError(
        f"Request {swapped.uid} is {swapped.stage.value} already."
      )

  def _await_room(self, swapped: _Swapped) -> None:
    for location in swapped.host:
      self.host_pool.cancel_move(location.block_id)
    swapped.home = ()
    swapped.stage = Stage.WAITING

  def _copy(
    self,
    swapped: _Swapped,
    old: tuple[Location, ...],
    new: tuple[Location, ...],
  ) -> None:
    effect = swap_blocks(swapped.uid, old, new, self._block_size)
    self._under_way[effect.swaps[0]] = swapped
    self._effects.append(effect)

  def _free_home(self, swapped: _Swapped) -> None:
    for location in swapped.home:
      self._pool.free(location.block_id, swapped.uid)
    swapped.home = ()

  def _free_host(self, swapped: _Swapped) -> None:
    for location in swapped.host:
      self.host_pool.free(location.block_id, swapped.uid)
    swapped.host = ()
