"""What fills a step: the host's plan as a tree of numpy arrays.

Every shape comes from the configuration, so that a step never compiles. Tables
are ragged: the entries of all rows lie one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infinite_llm.cache.block_table import BlockTable
from infinite_llm.types import NULL_BLOCK_ID
from pallas_kernels.micro_attention.api import BlockTables


class StepBatch(NamedTuple):
  """Rows of one instance in one step.

  Attributes:
    tokens: `[T]` int32 token ids.
    positions: `[T]` int32 their positions; -1 pads.
    cu_seqlens: `[B + 1]` int32 where each row's tokens start.
    append_block: `[T]` int32 own rBlock that takes each token's KV.
    append_offset: `[T]` int32 place of the token in it.
    tag_block: `[W]` int32 rBlocks that this step writes; null pads.
    tag_value: `[W]` uint32 content tag that each has after the step.
    tables: Own rBlocks of each row, `B` rows.
    demand: `[B]` uint32 coverage that the row must reach over all holders.
  """

  tokens: np.ndarray
  positions: np.ndarray
  cu_seqlens: np.ndarray
  append_block: np.ndarray
  append_offset: np.ndarray
  tag_block: np.ndarray
  tag_value: np.ndarray
  tables: BlockTables
  demand: np.ndarray


class RowInput(NamedTuple):
  """One row: some tokens of one request.

  Attributes:
    token_ids: The tokens to compute, at least one.
    start: Position of the first.
    table: Where the request's rBlocks lie; covers the new tokens.
  """

  token_ids: Sequence[int]
  start: int
  table: BlockTable


def build_batch(
  rows: Sequence[RowInput],
  *,
  num_tokens: int,
  num_rows: int,
  table_capacity: int,
  block_size: int,
) -> StepBatch:
  """Lays rows out for a program.

  Args:
    rows: At most `num_rows` rows with at most `num_tokens` tokens in all. In a
      decode step, where `num_tokens == num_rows`, each has one.
    num_tokens: T of the program.
    num_rows: B of the program.
    table_capacity: E of the program.
    block_size: P, tokens per rBlock.

  Returns:
    The batch, padded.
  """
  batch = _empty_batch(num_tokens, num_rows, table_capacity, block_size)
  token = tag = entry = 0
  for b, (token_ids, start, table) in enumerate(rows):
    end = start + len(token_ids)
    span = slice(token, token + len(token_ids))
    positions = np.arange(start, end)
    first = start // block_size
    touched = range(first, -(-end // block_size))
    blocks = np.asarray([table.location(i).block_id for i in touched])
    batch.tokens[span] = token_ids
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

    entry = _add_table(batch.tables, b, entry, table, touched.stop)
    batch.demand[b] = table.demand(end)
  if num_tokens == num_rows and all(len(row.token_ids) == 1 for row in rows):
    # Padding rows have a padding token each, as decode programs assume. A
    # prefill program may be of this size too, with other rows.
    batch.cu_seqlens[:] = np.arange(num_rows + 1)
  return batch


def build_check(
  tables: Sequence[tuple[int, BlockTable, int]],
  *,
  num_rows: int,
  table_capacity: int,
  block_size: int,
) -> tuple[BlockTables, np.ndarray]:
  """Lays tables out for a coverage check without tokens.

  Args:
    tables: `(row, table, num_tokens)` of each request to check.
    num_rows: B of the program.
    table_capacity: E of the program.
    block_size: P, tokens per rBlock.

  Returns:
    Own tables of `B` rows, and `[B]` uint32 demands.
  """
  arrays = _empty_tables(num_rows, table_capacity)
  demand = np.zeros(num_rows, np.uint32)
  entry = 0
  for row, table, num_tokens in tables:
    num_blocks = -(-num_tokens // block_size)
    entry = _add_table(arrays, row, entry, table, num_blocks)
    demand[row] = table.demand(num_tokens)
  return arrays, demand


def tag_writes(num_tokens: int, num_rows: int, block_size: int) -> int:
  """W: most rBlocks that a step of these sizes can write."""
  if num_tokens == num_rows:
    return num_rows
  return num_tokens // block_size + 2 * num_rows


def _add_table(
  arrays: BlockTables, row: int, entry: int, table: BlockTable, num_blocks: int
) -> int:
  """Writes a row's entries below `num_blocks`; returns where the next start."""
  entries = table.local_entries().below(num_blocks)
  end = entry + len(entries)
  arrays.block_ids[entry:end] = entries.block_ids
  arrays.logical_ids[entry:end] = entries.logical_ids
  arrays.starts[row] = entry
  arrays.counts[row] = len(entries)
  return end


def _empty_tables(num_rows: int, capacity: int) -> BlockTables:
  return BlockTables(
    block_ids=np.full(capacity, NULL_BLOCK_ID, np.int32),
    logical_ids=np.zeros(capacity, np.int32),
    starts=np.zeros(num_rows, np.int32),
    counts=np.zeros(num_rows, np.int32),
  )


def _empty_batch(
  num_tokens: int, num_rows: int, table_capacity: int, block_size: int
) -> StepBatch:
  writes = tag_writes(num_tokens, num_rows, block_size)
  return StepBatch(
    tokens=np.zeros(num_tokens, np.int32),
    positions=np.full(num_tokens, -1, np.int32),
    cu_seqlens=np.zeros(num_rows + 1, np.int32),
    append_block=np.full(num_tokens, NULL_BLOCK_ID, np.int32),
    append_offset=np.zeros(num_tokens, np.int32),
    tag_block=np.full(writes, NULL_BLOCK_ID, np.int32),
    tag_value=np.zeros(writes, np.uint32),
    tables=_empty_tables(num_rows, table_capacity),
    demand=np.zeros(num_rows, np.uint32),
  )
