"""Ring attention: the KV travels, the queries stay (arXiv 2310.01889).

Each instance holds a part of the context and some of the queries, and passes
the KV that it has just attended on to the next one, while it attends to what it
got before. In prefill every instance has a part of the chunk's queries; in
decode one has the only query and the others merely pass KV on, as the paper
compares it with DistAttention (arXiv 2401.02669, section on attention).

Runs inside `shard_map` over ("instance", "tensor").
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState, empty_state, merge
from pallas_kernels.micro_attention.api import BlockTables


class RingPart(NamedTuple):
  """One instance's part of the context, in one layer.

  Ring attention keeps the KV of a layer together, so that a part travels
  without being packed; instances hold equally many rBlocks, or pad.

  Attributes:
    kv: `[1 + M, 1, 2, K, P, D]` the rBlocks behind a null block.
    logical_ids: `[1 + M]` int32 number of each in the request.
    count: `[]` int32. How many of the `M` hold KV; the others pad.
  """

  kv: jax.Array
  logical_ids: jax.Array
  count: jax.Array


def ring_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  positions: jax.Array,
  part: RingPart,
  window: Window,
) -> AttentionState:
  """Attends queries of one request to all of its context.

  The next part is on its way while the present one is attended. Two parts are
  in memory at a time: without the barrier XLA would send all of them at once,
  and those of later layers too.

  Collective over axis: "instance".

  Args:
    q: `[T, H, D]` this instance's queries, perhaps none.
    cu_seqlens: `[2]` int32 where they begin and end.
    positions: `[T]` int32 of each; -1 pads.
    part: This instance's part of the context.
    window: What the layer looks at.

  Returns:
    State over `[T, H, D]`.
  """
  num_instances = jax.lax.axis_size(INSTANCE_AXIS)
  ring = [(i, (i + 1) % num_instances) for i in range(num_instances)]
  state = empty_state(q.shape)
  for step in range(num_instances):
    part, state, q = jax.lax.optimization_barrier((part, state, q))
    is_last = step == num_instances - 1
    coming = part if is_last else jax.lax.ppermute(part, INSTANCE_AXIS, ring)
    attended = local_attention(
      q, cu_seqlens, positions, part.kv, 0, _tables(part), window
    )
    state = merge(state, attended)
    part = coming
  return state


def _tables(part: RingPart) -> BlockTables:
  """One row of all rBlocks that hold KV."""
  return BlockTables(
    block_ids=jnp.arange(part.kv.shape[0], dtype=jnp.int32),
    logical_ids=part.logical_ids,
    starts=jnp.ones((1,), jnp.int32),
    counts=part.count[None],
  )
