"""What fills a step: the host's plan as a tree of numpy arrays.

Every shape comes from the configuration, so that a step never compiles. Table
entries lie on the devices; a batch says where each row's are, and brings those
that are new.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.cache.table_store import EntryWrites
from infinite_llm.errors import InvariantError
from infinite_llm.types import NULL_BLOCK_ID


class StepBatch(NamedTuple):
  """Rows of one instance in one step.

  Attributes:
    tokens: `[T]` int32 token ids.
    token_slots: `[T]` int32 slot of the sampler whose newest token it is
      instead; -1 for those that are in `tokens`.
    positions: `[T]` int32 their positions; -1 pads.
    cu_seqlens: `[B + 1]` int32 where each row's tokens start.
    append_block: `[T]` int32 own rBlock that takes each token's KV.
    append_offset: `[T]` int32 place of the token in it.
    tag_block: `[W]` int32 rBlocks that this step writes; null pads.
    tag_value: `[W]` uint32 content tag that each has after the step.
    starts: `[B]` int32 where the entries of each row's own rBlocks start.
    counts: `[B]` int32 how many there are.
    writes: `[W]` entries to write before anything reads them.
    demand: `[B]` uint32 coverage that the row must reach over all holders.
  """

  tokens: np.ndarray
  token_slots: np.ndarray
  positions: np.ndarray
  cu_seqlens: np.ndarray
  append_block: np.ndarray
  append_offset: np.ndarray
  tag_block: np.ndarray
  tag_value: np.ndarray
  starts: np.ndarray
  counts: np.ndarray
  writes: EntryWrites
  demand: np.ndarray


class RowInput(NamedTuple):
  """One row: some tokens of one request.

  Attributes:
    token_ids: The tokens to compute, at least one.
    start: Position of the first.
    table: Where the request's rBlocks lie; covers the new tokens.
    token_slot: Slot of the sampler with the newest token of its request, which
      is the row's only one, and in `token_ids` any number; None if those are
      known.
  """

  token_ids: Sequence[int]
  start: int
  table: BlockTable
  token_slot: int | None = None

  @property
  def end(self) -> int:
    """One past the position of the last token."""
    return self.start + len(self.token_ids)

  def entries(self) -> EntrySpan:
    """The rBlocks at home that the row reads and writes."""
    return own_entries(self.table, self.end)


def smallest_bucket(
  rows: Sequence[Sequence[RowInput]], buckets: Sequence[int]
) -> int:
  """Smallest bucket that takes the rows of every instance."""
  needed = max(sum(len(row.token_ids) for row in batch) for batch in rows)
  for bucket in buckets:
    if needed <= bucket:
      return bucket
  raise InvariantError(
    f"A step of {needed} tokens was planned, but the largest bucket takes"
    f" {buckets[-1]}."
  )


def own_entries(table: BlockTable, num_tokens: int) -> EntrySpan:
  """The rBlocks at home that hold a request's first tokens."""
  return table.local_entries().below(-(-num_tokens // table.block_size))


def build_batch(
  rows: Sequence[RowInput],
  starts: Sequence[int],
  writes: EntryWrites,
  *,
  num_tokens: int,
  num_rows: int,
  block_size: int,
) -> StepBatch:
  """Lays rows out for a program.

  Args:
    rows: At most `num_rows` rows with at most `num_tokens` tokens in all. In a
      decode step, where `num_tokens == num_rows`, each has one.
    starts: Where each row's `entries()` lie on the devices.
    writes: Entries that the devices lack; at most `max_writes` of them.
    num_tokens: T of the program.
    num_rows: B of the program.
    block_size: P, tokens per rBlock.

  Returns:
    The batch, padded.
  """
  batch = _empty_batch(writes, num_tokens, num_rows, block_size)
  if num_tokens == num_rows and all(len(row.token_ids) == 1 for row in rows):
    _fill_decode(batch, rows, block_size)
    batch.starts[: len(rows)] = starts
    return batch
  token = tag = 0
  for b, row in enumerate(rows):
    (token_ids, start, table, token_slot), end = row, row.end
    span = slice(token, token + len(token_ids))
    positions = np.arange(start, end)
    first = start // block_size
    touched = range(first, -(-end // block_size))
    blocks = np.asarray([table.location(i).block_id for i in touched])
    batch.tokens[span] = token_ids
    if token_slot is not None:
      raise InvariantError("Only decode programs take tokens of a sampler.")
    batch.positions[span] = positions
    batch.append_block[span] = blocks[positions // block_size - first]
    batch.append_offset[span] = positions % block_size
    token = span.stop
    batch.cu_seqlens[b + 1 :] = token

    for logical_id, block_id in zip(touched, blocks, strict=True):
      filled = min(block_size, end - logical_id * block_size)
      batch.tag_block[tag] = block_id
      batch.tag_value[tag] = table.tag(logical_id, filled)
      tag += 1

    batch.starts[b] = starts[b]
    batch.counts[b] = len(row.entries())
    batch.demand[b] = table.demand(end)
  return batch


def _fill_decode(
  batch: StepBatch, rows: Sequence[RowInput], block_size: int
) -> None:
  """Lays rows of one token each out, hundreds of times as often as others."""
  filled = []
  for token_ids, start, table, token_slot in rows:
    logical_id, offset = divmod(start, block_size)
    block_id = table.location(logical_id).block_id
    tag = table.tag(logical_id, offset + 1)
    slot = -1 if token_slot is None else token_slot
    count = len(own_entries(table, start + 1))
    demand = table.demand(start + 1)
    filled.append(
      (token_ids[0], slot, start, block_id, offset, tag, count, demand)
    )
  # Padding rows have a padding token each, as decode programs assume. A prefill
  # program may be of this size too, with other rows.
  batch.cu_seqlens[:] = np.arange(len(batch.cu_seqlens))
  if not rows:
    return
  columns = np.array(filled, np.int64).T
  for target, column in zip(
    (
      batch.tokens,
      batch.token_slots,
      batch.positions,
      batch.append_block,
      batch.append_offset,
      batch.tag_value,
      batch.counts,
      batch.demand,
    ),
    columns,
    strict=True,
  ):
    target[: len(rows)] = column
  batch.tag_block[: len(rows)] = batch.append_block[: len(rows)]


class CheckBatch(NamedTuple):
  """Rows of one instance in a coverage check without tokens.

  Attributes:
    starts: `[B]` int32 where the entries of each row's own rBlocks start.
    counts: `[B]` int32 how many there are.
    demand: `[B]` uint32 coverage that the row must reach over all holders.
  """

  starts: np.ndarray
  counts: np.ndarray
  demand: np.ndarray


class CheckRow(NamedTuple):
  """One request of a coverage check.

  Attributes:
    row: Its row in the program.
    table: Where its rBlocks lie.
    num_tokens: How many of its first tokens are to be covered, but for what is
      in HOST.
  """

  row: int
  table: BlockTable
  num_tokens: int

  def entries(self) -> EntrySpan:
    """The rBlocks at home that are to be there."""
    return own_entries(self.table, self.num_tokens)


def build_check(
  checks: Sequence[CheckRow], starts: Sequence[int], num_rows: int
) -> CheckBatch:
  """Lays requests out for a coverage check.

  Args:
    checks: The requests.
    starts: Where the `entries()` of each lie on the devices.
    num_rows: B of the program.
  """
  batch = CheckBatch(
    starts=np.zeros(num_rows, np.int32),
    counts=np.zeros(num_rows, np.int32),
    demand=np.zeros(num_rows, np.uint32),
  )
  for check, start in zip(checks, starts, strict=True):
    batch.starts[check.row] = start
    batch.counts[check.row] = len(check.entries())
    batch.demand[check.row] = check.table.demand_of_hbm(check.num_tokens)
  return batch


def max_writes(num_tokens: int, num_rows: int, block_size: int) -> int:
  """W: most rBlocks that a step of these sizes can write.

  A step has as many places for new table entries, since an rBlock is rarely
  allocated before the step that writes it.
  """
  if num_tokens == num_rows:
    return num_rows
  return num_tokens // block_size + 2 * num_rows


def pad_writes(writes: EntryWrites, size: int) -> EntryWrites:
  """Pads `writes` to `[size]`; a padding place is past the end of any array.

  Raises:
    InvariantError: If there are more than `size`.
  """
  count = len(writes.at)
  if count > size:
    raise InvariantError(
      f"A program takes {size} table entries at most; got {count}."
    )
  padded = EntryWrites(
    at=np.full(size, np.iinfo(np.int32).max, np.int32),
    block_ids=np.full(size, NULL_BLOCK_ID, np.int32),
    logical_ids=np.zeros(size, np.int32),
  )
  for target, source in zip(padded, writes, strict=True):
    target[:count] = source
  return padded


def _empty_batch(
  writes: EntryWrites, num_tokens: int, num_rows: int, block_size: int
) -> StepBatch:
  most = max_writes(num_tokens, num_rows, block_size)
  return StepBatch(
    tokens=np.zeros(num_tokens, np.int32),
    token_slots=np.full(num_tokens, -1, np.int32),
    positions=np.full(num_tokens, -1, np.int32),
    cu_seqlens=np.zeros(num_rows + 1, np.int32),
    append_block=np.full(num_tokens, NULL_BLOCK_ID, np.int32),
    append_offset=np.zeros(num_tokens, np.int32),
    tag_block=np.full(most, NULL_BLOCK_ID, np.int32),
    tag_value=np.zeros(most, np.uint32),
    starts=np.zeros(num_rows, np.int32),
    counts=np.zeros(num_rows, np.int32),
    writes=pad_writes(writes, most),
    demand=np.zeros(num_rows, np.uint32),
  )
