"""Ragged block tables: which rBlocks each sequence reads here."""

from typing import NamedTuple

import jax


class BlockTables(NamedTuple):
  """The rBlocks of `B` sequences (rows) in one pool, one row after another.

  Row `b` owns the entries `[starts[b], starts[b] + counts[b])`; no other entry
  is ever read. A row may lack any of its sequence's rBlocks: other holders
  have those, and `attention_state.merge` makes the whole. Entries may stand in
  any order; ascending logical numbers only help an implementation to skip what
  no query sees.

  Attributes:
    block_ids: `[E]` int32. Where each rBlock lies in the pool. An entry that
      points at `NULL_BLOCK_ID` holds no KV.
    logical_ids: `[E]` int32. Number of each rBlock in its sequence: its tokens
      have the positions `[logical_id * P, (logical_id + 1) * P)`.
    starts: `[B]` int32. First entry of each row.
    counts: `[B]` int32. Entries of each row; may be 0.
  """

  block_ids: jax.Array
  logical_ids: jax.Array
  starts: jax.Array
  counts: jax.Array
