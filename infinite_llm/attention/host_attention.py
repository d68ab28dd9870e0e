"""Attention over rBlocks in host memory: a context larger than all HBM.

Each instance attends the rBlocks that it has in HBM, then, slab by slab, those
that it has in host memory while the next slab's part comes over its link; the
states merge as those of instances do. Runs inside `shard_map`; no collective.
"""

import jax

from infinite_llm.attention.dist_attention import Window, local_attention
from pallas_kernels.attention_state import AttentionState, merge
from pallas_kernels.micro_attention.api import BlockTables


def staged_attention(
  state: AttentionState,
  q: jax.Array,
  cu_seqlens: jax.Array,
  positions: jax.Array,
  staged: jax.Array,
  tables: BlockTables,
  window: Window,
) -> AttentionState:
  """Adds one slab's part of a layer to what was attended so far.

  Args:
    state: Over `[T, H, D]`, of the context attended so far.
    q: `[T, H, D]` queries of one request.
    cu_seqlens: `[2]` int32 where they begin and end.
    positions: `[T]` int32 of each; -1 pads.
    staged: `[1 + S, 1, 2, K, P, D]` this layer of a slab, in HBM.
    tables: One row over it.
    window: What the layer looks at.

  Returns:
    State over `[T, H, D]`.
  """
  attended = local_attention(
    q, cu_seqlens, positions, staged, 0, tables, window
  )
  return merge(state, attended)
