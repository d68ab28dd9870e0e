"""How a request larger than all HBM keeps some of its rBlocks in HOST.

One request of an instance at a time. It keeps some rBlocks in HBM; when it
needs more, its oldest full, proved ones there move to other instances as long
as these lend, and after that they are copied to HOST, a slab at a time. Steps
attend them in either place (`attention/host_attention.py`). The books change
when the data plane acknowledges the copies. What is in HOST never comes back:
it goes when the request ends or is to be computed again.
"""

import dataclasses
from collections.abc import Collection, Sequence

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.rblock import Location
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.account import Account, Phase
from infinite_llm.scheduler.debtor import Debtor
from infinite_llm.scheduler.effects import (
  DropOverflow,
  Effect,
  OverflowBlocks,
  Swap,
  swap_blocks,
)
from infinite_llm.types import RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverflowRule:
  """Which requests may overflow, and by how much.

  Attributes:
    reachable_blocks: rBlocks of HBM, own and lent ones, that a request could
      have if it were alone; only a larger one overflows.
    kept_blocks: rBlocks that it keeps in its instance's HBM at most.
    slab_blocks: S, rBlocks that go to HOST together.
  """

  reachable_blocks: int
  kept_blocks: int
  slab_blocks: int


@dataclasses.dataclass(kw_only=True, eq=False)
class _Leaving:
  """rBlocks on their way to HOST.

  Attributes:
    account: Of the request.
    logical_ids: Their numbers in it.
    home: Where they lie in HBM.
    host: Where they are to lie in HOST.
    is_dropped: Nobody wants them any more.
  """

  account: Account
  logical_ids: tuple[int, ...]
  home: tuple[Location, ...]
  host: tuple[Location, ...]
  is_dropped: bool = False


class Overflow:
  """Keeps the books of the request that overflows on one instance.

  Attributes:
    uid: That request; None if there is none.
  """

  def __init__(
    self,
    debtor: Debtor,
    pool: BlockPool,
    host: BlockPool | None,
    rule: OverflowRule | None,
    block_size: int,
  ):
    """Makes the books of an instance on which nothing overflows.

    Args:
      debtor: Keeps the accounts of requests that run.
      pool: The instance's HBM.
      host: Its host memory; None if it has none.
      rule: Which requests may overflow; None if none may.
      block_size: P, tokens per rBlock.
    """
    self.uid: RequestUid | None = None
    self._debtor = debtor
    self._pool = pool
    self._host_pool = host
    self._rule = rule
    self._block_size = block_size
    # By the first copy of each: its tags tell it from any other.
    self._leaving: dict[Swap, _Leaving] = {}
    self._in_host: list[Location] = []
    self._effects: list[Effect] = []

  @property
  def most_blocks(self) -> int:
    """rBlocks of HOST that a request may have while it runs; 0 if none may."""
    return 0 if self._rule is None else self._host.counts().total

  @property
  def attended(self) -> RequestUid | None:
    """The request whose steps attend HOST; None if there is none."""
    return self.uid if self._in_host else None

  @property
  def lacks_host(self) -> bool:
    """Whether HOST has no room for a slab, which others could make."""
    return self._rule is not None and (
      self._host.num_free < self._rule.slab_blocks
    )

  def is_beyond(self, num_tokens: int) -> bool:
    """Whether so many tokens need more HBM than a request can reach.

    False where nothing may overflow.
    """
    return self._rule is not None and (
      -(-num_tokens // self._block_size) > self._rule.reachable_blocks
    )

  def needed_blocks(self, num_tokens: int) -> int:
    """rBlocks of HBM, here and elsewhere, that so many tokens need.

    Two requests that counted on the same rBlocks elsewhere would wait for each
    other.
    """
    num_blocks = -(-num_tokens // self._block_size)
    if self._rule is None or not self.is_beyond(num_tokens):
      return num_blocks
    slab = self._rule.slab_blocks
    in_host = self.most_blocks // slab * slab
    return max(num_blocks - in_host, self._rule.kept_blocks)

  def may_enter(self, num_tokens: int) -> bool:
    """Whether a request of so many tokens need not wait for another one."""
    return self.uid is None or not self.is_beyond(num_tokens)

  def takes(self, uid: RequestUid, num_tokens: int) -> bool:
    """Whether a running request of so many tokens overflows, or is to."""
    if self.uid is not None:
      return uid == self.uid
    return self.is_beyond(num_tokens)

  def enter(self, uid: RequestUid) -> bool:
    """Has a request keep rBlocks in HOST from now on.

    Args:
      uid: An open request.

    Returns:
      Whether it does. False if another one does, and for now if it is busy.
    """
    if self.uid is not None:
      return uid == self.uid
    account = self._debtor.account(uid)
    if account.phase is not Phase.IDLE:
      return False
    account.overflows = True
    self.uid = uid
    return True

  def room(self, uid: RequestUid, wanted: int) -> int:
    """How many of the rBlocks of HBM that a request wants it may have.

    All of them, unless it is the one that overflows.
    """
    if uid != self.uid or self._rule is None:
      return wanted
    held = len(self._debtor.account(uid).table.local_entries())
    return max(min(wanted, self._rule.kept_blocks - held), 0)

  def chunk_tokens(self, most: int) -> int:
    """Tokens of a step that attends HOST: what a slab makes room for."""
    if self._rule is None:
      return most
    return min(most, self._rule.slab_blocks * self._block_size)

  def begin(self) -> bool:
    """Starts to copy a slab of the request's oldest rBlocks in HBM to HOST.

    Returns:
      Whether one is under way now. False if none overflows, or has a slab of
      full, proved rBlocks at home, if it is busy, and if HOST has no room.
    """
    if self._leaving:
      return True
    if self.uid is None or self._rule is None:
      return False
    account, count = self._debtor.account(self.uid), self._rule.slab_blocks
    oldest = account.movable(count)
    if account.phase is not Phase.IDLE or len(oldest) < count:
      return False
    host = self._host.allocate(count, self.uid)
    if host is None:
      return False
    home = tuple(account.table.location(n) for n in oldest)
    for location in home:
      self._pool.begin_move(location.block_id)
    account.phase = Phase.OVERFLOWING
    swaps = swap_blocks(self.uid, home, host, self._block_size, oldest).swaps
    self._leaving[swaps[0]] = _Leaving(
      account=account, logical_ids=oldest, home=home, host=host
    )
    self._effects.append(OverflowBlocks(uid=self.uid, swaps=swaps))
    return True

  def gives_way(self, uid: RequestUid) -> bool:
    """Whether HBM is about to become free, so that a request can stay.

    Args:
      uid: Who is to be preempted; it makes room if it can overflow.
    """
    return bool(self._leaving) or (uid == self.uid and self.begin())

  def on_copied(self, effect: OverflowBlocks) -> None:
    """Notes that the data plane copied a slab to HOST, or tried to.

    Raises:
      InvariantError: If no such copies are under way.
    """
    leaving = self._leaving.pop(effect.swaps[0], None)
    if leaving is None:
      raise InvariantError(
        f"No slab like this is on its way to HOST on instance"
        f" {self._pool.instance}: {effect.swaps[:1]}."
      )
    for location in leaving.home:
      self._pool.free(location.block_id, effect.uid)
    if leaving.is_dropped:
      self._free_host(leaving.host, effect.uid)
      return
    for swap, location in zip(effect.swaps, leaving.host, strict=True):
      self._host.mark_live(location.block_id)
      leaving.account.table.switch(swap.logical_id, location)
    self._in_host += leaving.host
    self._debtor.rest(effect.uid)

  def drop(self, uid: RequestUid) -> Collection[int]:
    """Gives up what a request has in HOST, if it is the one that overflows.

    Args:
      uid: A request that is about to be closed.

    Returns:
      Logical numbers of rBlocks that are not to be freed with the others: they
      are being copied to HOST.
    """
    if uid != self.uid:
      return ()
    self.uid = None
    self._free_host(self._in_host, uid)
    self._in_host = []
    copying: list[int] = []
    account = self._debtor.account(uid)
    for leaving in self._leaving.values():
      if leaving.account is account:
        leaving.is_dropped = True
        copying += leaving.logical_ids
    self._effects.append(DropOverflow(uid=uid))
    return copying

  def drain_effects(self) -> list[Effect]:
    """Takes what the data plane is to do now, in order."""
    effects, self._effects = self._effects, []
    return effects

  @property
  def _host(self) -> BlockPool:
    if self._host_pool is None:
      raise InvariantError(f"Instance {self._pool.instance} has no HOST pool.")
    return self._host_pool

  def _free_host(self, places: Sequence[Location], uid: RequestUid) -> None:
    for location in places:
      self._host.free(location.block_id, uid)
