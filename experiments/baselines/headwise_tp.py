"""Head-wise tensor parallelism: each instance has some heads of all tokens.

The usual way to spread one long request over more devices: all of a layer's
projections and its KV are cut by heads. It reads as little KV a device as
DistAttention does, but only while there are KV heads to give out, and it has to
be chosen before the first token, for all requests alike.

Runs inside `shard_map` over ("instance", "tensor").
"""

import jax

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables


def headwise_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  positions: jax.Array,
  kv: jax.Array,
  layer: int,
  tables: BlockTables,
  window: Window,
) -> AttentionState:
  """Attends with an instance's own heads, and gathers those of all.

  Collective over axis: "instance".

  Args:
    q: `[T, H, D]` queries of all heads, the same everywhere.
    cu_seqlens: `[B + 1]` int32 where each row's queries start.
    positions: `[T]` int32; -1 pads.
    kv: `[N, L, 2, K / I, P, D]` this instance's KV heads of all rBlocks.
    layer: Layer of the pool to read.
    tables: Tables of `B` rows, the same everywhere.
    window: What the layer looks at.

  Returns:
    State over `[T, H, D]`, the same everywhere.

  Raises:
    ValueError: If the query heads cannot be cut.
  """
  num_instances = jax.lax.axis_size(INSTANCE_AXIS)
  num_q_heads = q.shape[1]
  if num_q_heads % num_instances:
    raise ValueError(
      f"H of q must be a multiple of the {num_instances} instances; got"
      f" {num_q_heads}."
    )
  count = num_q_heads // num_instances
  first = jax.lax.axis_index(INSTANCE_AXIS) * count
  own = jax.lax.dynamic_slice_in_dim(q, first, count, axis=1)
  state = local_attention(own, cu_seqlens, positions, kv, layer, tables, window)
  return jax.lax.all_gather(state, INSTANCE_AXIS, axis=1, tiled=True)
