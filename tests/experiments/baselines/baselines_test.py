"""The baselines give what attention over the whole context gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.baselines.headwise_tp import headwise_attention
from experiments.baselines.ring_attention import RingPart, ring_attention
from infinite_llm.attention.dist_attention import Window
from infinite_llm.distributed.mesh import make_mesh
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables, micro_attention
from tests.tolerances import lse_error, relative_error, tolerance

pytestmark = pytest.mark.bench

I, K, P, D, H, M = 4, 4, 8, 16, 8, 5
SCALE = D**-0.5
PER_INSTANCE = PartitionSpec("instance")
REPLICATED = PartitionSpec()


class Context:
  """KV of one request of `length` tokens, and queries of its last ones."""

  def __init__(self, length, num_queries, seed=0):
    rng = np.random.default_rng(seed)
    self.length = length
    self.num_blocks = -(-length // P)
    self.kv = rng.standard_normal(
      (1 + self.num_blocks, 1, 2, K, P, D), dtype=np.float32
    )
    self.q = rng.standard_normal((num_queries, H, D), dtype=np.float32)
    self.positions = np.arange(length - num_queries, length, dtype=np.int32)

  def tables(self) -> BlockTables:
    """One row: rBlock `i` of the request is `1 + i` of the pool."""
    ids = np.arange(self.num_blocks, dtype=np.int32)
    ends = np.asarray([0], np.int32), np.asarray([len(ids)], np.int32)
    return BlockTables(1 + ids, ids, *ends)

  def expected(self, window) -> AttentionState:
    return micro_attention(
      jnp.asarray(self.q),
      jnp.asarray([0, len(self.q)], jnp.int32),
      jnp.asarray(self.positions),
      jnp.asarray(self.kv),
      0,
      jax.tree.map(jnp.asarray, self.tables()),
      scale=SCALE,
      max_query_tokens=len(self.q),
      sliding_window=window,
      implementation="reference",
    )

  def part(self, logical_ids) -> RingPart:
    """A part with these rBlocks, filled up with NaN to `M`."""
    kv = np.full((1 + M, *self.kv.shape[1:]), np.nan, np.float32)
    ids = np.full(1 + M, -7, np.int32)
    for at, logical_id in enumerate(logical_ids, start=1):
      kv[at], ids[at] = self.kv[1 + logical_id], logical_id
    return RingPart(kv, ids, np.int32(len(logical_ids)))


def window_of(sliding_window, num_queries) -> Window:
  return Window(SCALE, sliding_window, num_queries)


def assert_close(state, expected):
  allowed = tolerance("float32")
  assert relative_error(state.out, expected.out) < allowed.attention
  assert lse_error(state.lse, expected.lse) < allowed.lse


def run_ring(context, holders, num_queries, window) -> AttentionState:
  """Queries in equal parts on all instances, KV where `holders` say."""
  parts = [
    context.part([n for n, holder in enumerate(holders) if holder == i])
    for i in range(I)
  ]
  parts = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
  size = -(-num_queries // I)
  padded = I * size
  q = np.zeros((padded, H, D), np.float32)
  positions = np.full(padded, -1, np.int32)
  q[:num_queries], positions[:num_queries] = context.q, context.positions

  def body(q, positions, part):
    whole = jnp.asarray([0, size], jnp.int32)
    part = jax.tree.map(lambda leaf: leaf[0], part)
    return ring_attention(q, whole, positions, part, window_of(window, size))

  run = jax.shard_map(
    body,
    mesh=make_mesh(I, 1),
    in_specs=PER_INSTANCE,
    out_specs=PER_INSTANCE,
    check_vma=False,
  )
  state = jax.jit(run)(q, positions, parts)
  return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_queries], state)


# Contexts with a full and with a partly filled last rBlock; one that leaves an
# instance without any, and one that does not lie in order.
CASES = {
  "even": (96, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
  "uneven": (85, [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3]),
  "one without": (61, [0, 0, 0, 2, 2, 2, 2, 3]),
  "scattered": (77, [2, 0, 1, 3, 0, 1, 2, 3, 0, 1]),
}


@pytest.mark.parametrize("num_queries", [1, 24])
@pytest.mark.parametrize(
  ("case", "sliding_window"),
  [*((case, None) for case in CASES), ("uneven", 19)],
)
def test_a_ring_attends_the_whole_context(case, num_queries, sliding_window):
  length, holders = CASES[case]
  context = Context(length, num_queries)
  state = run_ring(context, holders, num_queries, sliding_window)
  assert_close(state, context.expected(sliding_window))


@pytest.mark.parametrize("sliding_window", [None, 19])
@pytest.mark.parametrize("num_queries", [1, 24])
def test_heads_of_all_instances_attend_the_whole_context(
  num_queries, sliding_window
):
  context = Context(77, num_queries)

  def body(q, positions, kv, tables):
    whole = jnp.asarray([0, num_queries], jnp.int32)
    window = window_of(sliding_window, num_queries)
    return headwise_attention(q, whole, positions, kv, 0, tables, window)

  run = jax.shard_map(
    body,
    mesh=make_mesh(I, 1),
    in_specs=(
      REPLICATED,
      REPLICATED,
      PartitionSpec(None, None, None, "instance"),
      REPLICATED,
    ),
    out_specs=REPLICATED,
    check_vma=False,
  )
  state = jax.jit(run)(
    context.q, context.positions, context.kv, context.tables()
  )
  assert_close(state, context.expected(sliding_window))


def test_heads_that_cannot_be_cut_are_refused():
  def body(q):
    none = jnp.zeros(1, jnp.int32)
    tables = BlockTables(none, none, none, none)
    kv = jnp.zeros((1, 1, 2, 1, P, D))
    whole = jnp.asarray([0, 1], jnp.int32)
    return headwise_attention(
      q, whole, none, kv, 0, tables, Window(1.0, None, 1)
    )

  run = jax.shard_map(
    body, mesh=make_mesh(I, 1), in_specs=REPLICATED, out_specs=REPLICATED
  )
  with pytest.raises(ValueError, match=r"H of q must be .* 4 instances; got 6"):
    run(jnp.zeros((1, 6, D)))
