"""What the devices of a cluster hold and prove, with integers for KV.

Beside its tag and epoch, each simulated rBlock keeps the *truth*: whose tokens
it really holds. Programs decide by tags and epochs alone, as those of
`cache/movement.py` and `attention/dist_attention.py` do; the truth is there to
find a proof that proved something wrong.
"""

from collections.abc import Iterable, Sequence

from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.content_tag import add_coverage, mix_tag
from infinite_llm.scheduler.effects import GrantEpochs, Move, Swap
from infinite_llm.scheduler.hosted_tables import HostedTables
from infinite_llm.scheduler.lease_messages import SlotName
from infinite_llm.scheduler.rmanager import SpillInfo
from infinite_llm.types import (
  NO_EPOCH,
  NULL_BLOCK_ID,
  BlockId,
  Epoch,
  InstanceId,
  RequestUid,
  Tier,
  value_type,
)

type Content = tuple[RequestUid, int, int]
"""`(uid, logical_id, tokens)`: so many right tokens of a request's rBlock."""

type Piece = tuple[InstanceId, BlockId, int]
"""`(holder, block_id, logical_id)`: an rBlock as a table names it.

Holder `i` is the HBM of instance i, `~i` its HOST.
"""


class Device:
  """The pool of one tier of an instance.

  Attributes:
    tag: Content tag of each rBlock, as programs wrote it.
    epoch: Epoch under which each rBlock may be received; none may in HOST.
    content: What each rBlock really holds; None if that is nobody's KV.
  """

  def __init__(self, num_blocks: int):
    """Makes a pool that holds nothing.

    Args:
      num_blocks: rBlocks with the null one.
    """
    self.tag = [0] * num_blocks
    self.epoch: list[Epoch] = [NO_EPOCH] * num_blocks
    self.content: list[Content | None] = [None] * num_blocks


@value_type
class Reading:
  """What a program found through the tables of one request.

  Attributes:
    coverage: Sum of the mixed tags, over all holders.
    pieces: The rBlocks that it read.
  """

  coverage: int
  pieces: tuple[Piece, ...]


class DataPlane:
  """All devices, and the programs that run on them.

  Attributes:
    devices: HBM of each instance.
    hosts: HOST of each instance.
    num_swapped: rBlocks that were copied between the two.
    num_arrived: Payloads that were written.
    num_refused: Payloads that were not accepted.
  """

  def __init__(
    self,
    num_instances: int,
    num_blocks: int,
    block_size: int,
    host_blocks: int = 0,
  ):
    """Makes devices that hold nothing.

    Args:
      num_instances: I.
      num_blocks: N, rBlocks of each pool with the null one.
      block_size: P, tokens per rBlock.
      host_blocks: rBlocks of each HOST pool with the null one; 0 if there is
        none.
    """
    self.devices = [Device(num_blocks) for _ in range(num_instances)]
    self.hosts = [Device(host_blocks) for _ in range(num_instances)]
    self.num_arrived = 0
    self.num_refused = 0
    self.num_swapped = 0
    self._num_blocks = num_blocks
    self._host_blocks = host_blocks
    self._block_size = block_size
    self._mixed: dict[tuple[int, int], int] = {}

  def reset(self, instance: InstanceId) -> None:
    """Loses all that an instance had."""
    self.devices[instance] = Device(self._num_blocks)
    self.hosts[instance] = Device(self._host_blocks)

  def grant(self, instance: InstanceId, effect: GrantEpochs) -> None:
    """Accepts payloads under new epochs; as `movement.grant_epochs`."""
    device = self.devices[instance]
    for block_id, epoch in zip(effect.block_ids, effect.epochs, strict=True):
      device.epoch[block_id] = epoch
      if epoch != NO_EPOCH:
        device.tag[block_id] = 0

  def exchange(self, move: Move) -> bool:
    """Carries one payload, as `movement.exchange`.

    Returns:
      Whether it was written.
    """
    source = self.devices[move.src_instance]
    target = self.devices[move.dst_instance]
    if source.tag[move.src_block] != move.src_tag or not self.accepts(
      target, move
    ):
      self.num_refused += 1
      return False
    target.tag[move.dst_block] = move.dst_tag
    target.content[move.dst_block] = source.content[move.src_block]
    self.num_arrived += 1
    return True

  def swap(
    self,
    instance: InstanceId,
    swaps: Iterable[Swap],
    to_tier: Tier,
    *,
    is_lost: bool,
  ) -> None:
    """Copies rBlocks between the tiers of an instance.

    Args:
      instance: Whose they are.
      swaps: Which ones.
      to_tier: Where to.
      is_lost: Nothing that could be proved arrives.
    """
    source, target = self.devices[instance], self.hosts[instance]
    if to_tier is Tier.HBM:
      source, target = target, source
    for one in swaps:
      is_right = source.tag[one.src_block] == one.src_tag and not is_lost
      target.tag[one.dst_block] = one.dst_tag if is_right else 0
      content = source.content[one.src_block] if is_right else None
      target.content[one.dst_block] = content
      self.num_swapped += is_right

  def accepts(self, target: Device, move: Move) -> bool:
    """Whether a receiver takes a payload."""
    return (
      move.dst_block != NULL_BLOCK_ID
      and move.dst_epoch != NO_EPOCH
      and target.epoch[move.dst_block] == move.dst_epoch
    )

  def write_tags(self, table: BlockTable, start: int, end: int) -> None:
    """Tags the rBlocks at home that a step over `[start, end)` writes."""
    device = self.devices[table.home]
    size = self._block_size
    for logical_id in range(start // size, -(-end // size)):
      filled = min(size, end - logical_id * size)
      block_id = table.location(logical_id).block_id
      device.tag[block_id] = table.tag(logical_id, filled)

  def write_tokens(
    self, table: BlockTable, start: int, end: int, *, is_right: bool
  ) -> None:
    """Keeps the truth about tokens `[start, end)`.

    Args:
      table: Where they lie.
      start: The first of them.
      end: One past the last of them.
      is_right: Whether they were computed from the request's own KV; otherwise
        they are garbage, and only what lay before them is right.
    """
    device = self.devices[table.home]
    size = self._block_size
    for logical_id in range(start // size, -(-end // size)):
      upto = end if is_right else start
      right = min(max(upto - logical_id * size, 0), size)
      block_id = table.location(logical_id).block_id
      device.content[block_id] = (table.uid, logical_id, right)

  def read(
    self,
    table: BlockTable,
    spill: SpillInfo | None,
    hosted: Sequence[HostedTables],
    num_tokens: int,
  ) -> Reading:
    """Reads a request's first tokens, wherever its tables say they are.

    Args:
      table: The owner's table.
      spill: How the request is named to creditors; None if all is at home.
      hosted: Tables of each instance.
      num_tokens: How many tokens.

    Returns:
      What was found.
    """
    pieces: list[Piece] = []
    home = table.home
    local = table.local_entries().below(-(-num_tokens // self._block_size))
    coverage = self._add(home, local, 0, pieces)
    coverage = self._add_host(table, coverage, pieces)
    if spill is not None:
      slot = SlotName(slot=spill.slot, epoch=spill.slot_epoch)
      for holder, version in spill.versions.items():
        answer = _answer(hosted[holder], home, slot, version)
        if answer is not None:
          coverage = self._add(holder, answer, coverage, pieces)
    return Reading(coverage=coverage, pieces=tuple(pieces))

  def wrong_piece(
    self, uid: RequestUid, pieces: Iterable[Piece], num_tokens: int
  ) -> str | None:
    """Says what is wrong with rBlocks that hold a request's first tokens.

    Args:
      uid: The request.
      pieces: What was read.
      num_tokens: Tokens that must be there.

    Returns:
      The first fault; None if each rBlock is there once and holds its tokens.
    """
    size = self._block_size
    missing = set(range(-(-num_tokens // size)))
    for holder, block_id, logical_id in pieces:
      needed = min(size, num_tokens - logical_id * size)
      if needed <= 0:
        continue
      if logical_id not in missing:
        return f"logical rBlock {logical_id} was read twice"
      missing.remove(logical_id)
      held = self.devices[holder] if holder >= 0 else self.hosts[~holder]
      content = held.content[block_id]
      if (
        content is None
        or content[0] != uid
        or content[1] != logical_id
        or content[2] < needed
      ):
        return (
          f"rBlock {block_id} of instance {holder} was read for logical rBlock"
          f" {logical_id} with {needed} tokens, but holds {content}"
        )
    if missing:
      return f"logical rBlocks {sorted(missing)} were not read"
    return None

  def _add_host(
    self, table: BlockTable, coverage: int, pieces: list[Piece]
  ) -> int:
    """Adds what lies in HOST, as steps that attend it do."""
    if not table.num_host:
      return coverage
    tags = self.hosts[table.home].tag
    for logical_id in range(table.num_blocks):
      location = table.location(logical_id)
      if location.tier is Tier.HOST:
        mixed = mix_tag(tags[location.block_id], logical_id)
        coverage = add_coverage(coverage, mixed)
        pieces.append((~table.home, location.block_id, logical_id))
    return coverage

  def _add(
    self,
    holder: InstanceId,
    entries: EntrySpan,
    coverage: int,
    pieces: list[Piece],
  ) -> int:
    tags = self.devices[holder].tag
    mixed = self._mixed
    block_ids: list[int]
    logical_ids: list[int]
    read = entries.log.read(entries.begin, entries.end)
    block_ids, logical_ids = read.tolist()
    added = 0
    for block_id, logical_id in zip(block_ids, logical_ids, strict=True):
      key = tags[block_id], logical_id
      if key not in mixed:
        mixed[key] = mix_tag(*key)
      added += mixed[key]
      pieces.append((holder, block_id, logical_id))
    return add_coverage(coverage, added)


def _answer(
  hosted: HostedTables, owner: InstanceId, slot: SlotName, version: int
) -> EntrySpan | None:
  """The table that a creditor's device answers with; None if it has none."""
  table = hosted.table(owner, slot)
  if table is None:
    return None
  if version == table.version:
    return table.current
  return table.previous if version == table.version - 1 else None
