"""DistAttention equals attention over the whole context, wherever it lies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from infinite_llm.attention import dist_attention
from infinite_llm.attention.decode_exchange import COLLECTIVES
from infinite_llm.attention.dist_attention import (
  NO_ROW,
  HostedRows,
  SpillSlots,
  Window,
)
from infinite_llm.cache import content_tag
from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.cache.kv_pool import coverage, mix_tags
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.group_inputs import (
  empty_slots,
  hosted_rows,
  shifts_of_slots,
)
from infinite_llm.scheduler.hosted_tables import HostedVersion
from pallas_kernels.attention_state import AttentionState, empty_state
from pallas_kernels.micro_attention.api import BlockTables, micro_attention
from tests.tolerances import lse_error, relative_error, tolerance

I, N, L, K, P, D, H, S = 4, 12, 2, 2, 8, 16, 4, 2
LAYER = 1
ROWS = 3
SCALE = D**-0.5
PER_INSTANCE = PartitionSpec("instance")


@dataclasses.dataclass
class Context:
  """A request whose rBlocks lie anywhere.

  Attributes:
    owner: Instance that asks.
    row: Its row in the owner's step.
    slot: Its spill slot; None if all is at home.
    length: Tokens of context, the query's own included.
    places: `(instance, block)` of each logical rBlock.
  """

  owner: int
  row: int
  slot: int | None
  length: int
  places: list[tuple[int, int]]

  def on(self, instance: int) -> list[tuple[int, int]]:
    """`(block, logical)` of the rBlocks on an instance."""
    return [(b, i) for i, (h, b) in enumerate(self.places) if h == instance]


class Cluster:
  """Random pools of four instances, and requests spread over them."""

  def __init__(self, seed: int):
    self.rng = np.random.default_rng(seed)
    self.pool = self.rng.standard_normal(
      (I * N, L, 2, K, P, D), dtype=np.float32
    )
    self.tag = self.rng.integers(1, 2**32, I * N, dtype=np.uint32)
    self.free = [list(self.rng.permutation(np.arange(1, N))) for _ in range(I)]
    self.contexts: list[Context] = []

  def add(self, owner, row, slot, length, holders):
    """Adds a request; `holders` gives the instance of each logical rBlock."""
    places = [(h, int(self.free[h].pop())) for h in holders]
    assert len(places) == -(-length // P)
    self.contexts.append(Context(owner, row, slot, length, places))

  def _spilled(self, holder: int) -> list[tuple[Context, EntrySpan]]:
    """What an instance hosts, by request."""
    return [
      (c, EntrySpan.of(*zip(*c.on(holder), strict=True)))
      for c in self.contexts
      if c.slot is not None and holder != c.owner and c.on(holder)
    ]

  def tables(self, num_rows: int) -> BlockTables:
    """Tables of every owner over all entries, stacked on a leading axis."""
    stacked = []
    for owner in range(I):
      rows = [[] for _ in range(num_rows)]
      for c in self.contexts:
        if c.owner == owner:
          rows[c.row] = c.on(owner)
      for _, hosted in self._spilled(owner):
        rows.append(
          list(zip(hosted.block_ids, hosted.logical_ids, strict=True))
        )
      every = tables_of(rows)
      own = {
        "starts": every.starts[:num_rows],
        "counts": every.counts[:num_rows],
      }
      stacked.append(every._replace(**own))
    return BlockTables(*map(np.stack, zip(*stacked, strict=True)))

  def hosted(self, num_rows: int, version=4, epoch=9) -> HostedRows:
    """What each instance hosts, installed under one version and epoch.

    Args:
      num_rows: As of `tables`, whose entries this is about.
      version: Version of every table.
      epoch: Epoch of every slot.
    """
    own = self.tables(num_rows).counts.sum(axis=1)
    stacked = []
    for holder in range(I):
      spilled = self._spilled(holder)
      versions = [
        HostedVersion(
          owner=c.owner,
          slot=c.slot,
          slot_epoch=epoch,
          version=version,
          entries=entries,
        )
        for c, entries in spilled
      ]
      ends = np.cumsum([own[holder], *(len(entries) for _, entries in spilled)])
      stacked.append(hosted_rows(versions, ends[:-1], I, S))
    return HostedRows(*map(np.stack, zip(*stacked, strict=True)))

  def slots(self, version=4, epoch=9) -> list[SpillSlots]:
    """Slots as the owners name them."""
    slots = [empty_slots(I, S) for _ in range(I)]
    for c in self.contexts:
      if c.slot is not None:
        slots[c.owner].rows[c.slot] = c.row
        slots[c.owner].epoch[c.slot] = epoch
        for holder, _ in c.places:
          if holder != c.owner:
            slots[c.owner].versions[c.slot, holder] = version
    return slots

  def expected(self, context: Context, q, positions):
    """Attention over the whole context, in one pool."""
    tables = tables_of(
      [[(h * N + b, i) for i, (h, b) in enumerate(context.places)]], capacity=64
    )
    return micro_attention(
      q,
      jnp.asarray([0, len(q)], jnp.int32),
      jnp.asarray(positions, jnp.int32),
      jnp.asarray(self.pool),
      LAYER,
      jax.tree.map(jnp.asarray, tables),
      scale=SCALE,
      max_query_tokens=len(q),
      implementation="reference",
    )


def tables_of(rows, capacity=N) -> BlockTables:
  """Ragged tables from `[(block, logical), ...]` of each row."""
  flat = [entry for row in rows for entry in row]
  block_ids = np.zeros(capacity, np.int32)
  logical_ids = np.zeros(capacity, np.int32)
  for e, (block, logical) in enumerate(flat):
    block_ids[e], logical_ids[e] = block, logical
  counts = np.asarray([len(row) for row in rows], np.int32)
  starts = (np.cumsum(counts) - counts).astype(np.int32)
  return BlockTables(block_ids, logical_ids, starts, counts)


def stack(trees):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def on_mesh(body, *args):
  """Runs `body` on four instances; every leaf has a leading instance axis."""
  mesh = make_mesh(I, 1)

  def local(*args):
    out = body(*jax.tree.map(lambda x: x[0], args))
    return jax.tree.map(lambda x: x[None], out)

  run = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=PER_INSTANCE,
      out_specs=PER_INSTANCE,
      check_vma=False,
    )
  )
  return jax.tree.map(np.asarray, run(*args))


def spread(seed: int, num_blocks: int) -> Cluster:
  """Requests on three owners: spread out, elsewhere only, and at home."""
  cluster = Cluster(seed)
  length = num_blocks * P - int(cluster.rng.integers(0, P))
  holders = [*cluster.rng.integers(0, I, num_blocks - 1), 0]
  cluster.add(0, 1, 1, length, [int(h) for h in holders])
  # Owner 2 has a single token at home; all that came before lies elsewhere.
  cluster.add(2, 0, 0, 2 * P + 1, [3, 1, 2])
  cluster.add(1, 2, None, P + 3, [1, 1])
  return cluster


def assert_close(state, rows, want) -> None:
  """Some rows of a state are the expected ones."""
  allowed = tolerance("float32")
  assert relative_error(state.out[rows], want.out) < allowed.attention
  assert lse_error(state.lse[rows], want.lse) < allowed.lse


@pytest.mark.parametrize("seed", range(4))
def test_decode_over_instances_equals_attention_in_one_place(seed):
  cluster = spread(seed, num_blocks=6)
  q = cluster.rng.standard_normal((I, ROWS, H, D), dtype=np.float32)
  positions = np.full((I, ROWS), -1, np.int32)
  for c in cluster.contexts:
    positions[c.owner, c.row] = c.length - 1

  def body(q, positions, pool, own, hosted, slots):
    answered = dist_attention.answer_slots(hosted, own, slots)
    return dist_attention.decode_attention(
      q,
      positions,
      pool,
      LAYER,
      own,
      answered,
      dist_attention.asked_positions(positions, slots),
      slots,
      Window(SCALE, None, 1),
    )

  state = on_mesh(
    body,
    q,
    positions,
    cluster.pool.reshape(I, N, L, 2, K, P, D),
    cluster.tables(ROWS),
    cluster.hosted(ROWS),
    stack(cluster.slots()),
  )
  for c in cluster.contexts:
    want = cluster.expected(c, q[c.owner, c.row][None], [c.length - 1])
    row = c.owner, slice(c.row, c.row + 1)
    assert_close(state, row, want)


@pytest.mark.parametrize(
  ("num_slots", "num_heads", "head_dim", "num_spared"),
  [
    (1, 4, 16, I),  # A block of NCCL's for each instance.
    (1, 32, 128, 2 * I),  # 16.1 KiB to each: two blocks.
    (4, 32, 128, 4),  # Five to each are more than are worth it.
  ],
)
def test_local_attention_leaves_multiprocessors_to_the_exchange_beside_it(
  num_slots, num_heads, head_dim, num_spared
):
  shape = I, I * num_slots, num_heads
  spared = []

  def body(hosted, operand):
    def beside(operand, num_spared):
      spared.append(num_spared)
      return operand

    return COLLECTIVES.return_states(hosted, beside, operand)

  hosted = AttentionState(
    np.zeros((*shape, head_dim), np.float32), np.zeros(shape, np.float32)
  )
  on_mesh(body, hosted, np.zeros((I, 1), np.float32))
  assert spared == [num_spared]


def test_only_what_lies_beside_the_exchange_spares_multiprocessors(monkeypatch):
  spared = []

  def attend(q, *_, spared_multiprocessors, **__):
    spared.append((len(q), spared_multiprocessors))
    return empty_state(q.shape)

  monkeypatch.setattr(dist_attention, "micro_attention", attend)
  cluster = spread(0, num_blocks=6)

  def body(q, positions, pool, own, hosted, slots):
    return dist_attention.decode_attention(
      q,
      positions,
      pool,
      LAYER,
      own,
      dist_attention.answer_slots(hosted, own, slots),
      dist_attention.asked_positions(positions, slots),
      slots,
      Window(SCALE, None, 1),
    )

  on_mesh(
    body,
    np.zeros((I, ROWS, H, D), np.float32),
    np.zeros((I, ROWS), np.int32),
    cluster.pool.reshape(I, N, L, 2, K, P, D),
    cluster.tables(ROWS),
    cluster.hosted(ROWS),
    stack(cluster.slots()),
  )
  assert spared == [(I * S, 0), (ROWS, I)]


@pytest.mark.parametrize("seed", range(4))
def test_prefill_chunk_over_instances_equals_attention_in_one_place(seed):
  cluster = Cluster(seed)
  chunk = 2 * P
  # The chunk's own rBlocks are at home, what came before lies anywhere.
  before = [int(h) for h in cluster.rng.integers(0, I, 4)]
  cluster.add(0, 0, 1, 6 * P, [*before, 0, 0])
  cluster.add(3, 0, 0, 3 * P + 5, [1, 2, 3, 3])
  # A single token, the only one at home; instance 3 has none of this context.
  cluster.add(1, 0, 0, 2 * P + 1, [2, 0, 1])
  q = cluster.rng.standard_normal((I, chunk, H, D), dtype=np.float32)
  positions = np.full((I, chunk), -1, np.int32)
  cu_seqlens = np.zeros((I, 2), np.int32)
  for c in cluster.contexts:
    count = min(chunk, c.length - 2 * P)
    positions[c.owner, :count] = np.arange(c.length - count, c.length)
    cu_seqlens[c.owner, 1] = count
  slots = cluster.slots()

  def body(q, cu_seqlens, positions, pool, own, hosted, slots, holders):
    answered = dist_attention.answer_slots(hosted, own, slots)
    return dist_attention.prefill_attention(
      q,
      cu_seqlens,
      positions,
      pool,
      LAYER,
      own,
      answered,
      slots,
      holders,
      Window(SCALE, None, chunk),
    )

  state = on_mesh(
    body,
    q,
    cu_seqlens,
    positions,
    cluster.pool.reshape(I, N, L, 2, K, P, D),
    cluster.tables(1),
    cluster.hosted(1),
    stack(slots),
    np.stack(
      [np.any([shifts_of_slots(i, s) for i, s in enumerate(slots)], axis=0)] * I
    ),
  )
  for c in cluster.contexts:
    count = cu_seqlens[c.owner, 1]
    want = cluster.expected(c, q[c.owner, :count], positions[c.owner, :count])
    assert_close(state, (c.owner, slice(count)), want)


def covered(cluster, hosted, slots):
  """Coverage of every row of every instance."""

  def body(tag, own, hosted, slots):
    answered = dist_attention.answer_slots(hosted, own, slots)
    return dist_attention.dist_coverage(tag, own, answered, slots)

  return on_mesh(
    body,
    cluster.tag.reshape(I, N),
    cluster.tables(ROWS),
    hosted,
    stack(slots),
  )


def demanded(cluster, context) -> int:
  """Coverage that the books demand for a request."""
  return functools.reduce(
    content_tag.add_coverage,
    (
      content_tag.mix_tag(int(cluster.tag[h * N + b]), i)
      for i, (h, b) in enumerate(context.places)
    ),
  )


class TestCoverage:
  def test_it_is_the_sum_over_all_holders(self):
    cluster = spread(0, num_blocks=6)
    sums = covered(cluster, cluster.hosted(ROWS), cluster.slots())
    for c in cluster.contexts:
      assert sums[c.owner, c.row] == demanded(cluster, c)

  def test_a_version_that_is_not_installed_answers_with_nothing(self):
    cluster = spread(1, num_blocks=6)
    hosted = cluster.hosted(ROWS, version=4)
    sums = covered(cluster, hosted, cluster.slots(version=6))
    spilled = [c for c in cluster.contexts if c.slot is not None]
    at_home = [c for c in cluster.contexts if c.slot is None]
    assert all(sums[c.owner, c.row] != demanded(cluster, c) for c in spilled)
    assert all(sums[c.owner, c.row] == demanded(cluster, c) for c in at_home)

  def test_an_older_epoch_of_the_slot_answers_with_nothing(self):
    cluster = spread(2, num_blocks=6)
    sums = covered(
      cluster, cluster.hosted(ROWS, epoch=8), cluster.slots(epoch=9)
    )
    for c in cluster.contexts:
      is_proved = sums[c.owner, c.row] == demanded(cluster, c)
      assert is_proved == (c.slot is None)

  def test_both_versions_can_be_read(self):
    cluster = spread(3, num_blocks=6)
    old, new = (cluster.hosted(ROWS, version=v) for v in (4, 5))
    both = HostedRows(
      *(
        getattr(old, name)
        if name == "epoch"
        else np.stack(
          [getattr(old, name)[:, 0], getattr(new, name)[:, 1]], axis=1
        )
        for name in HostedRows._fields
      )
    )
    for version in (4, 5):
      sums = covered(cluster, both, cluster.slots(version=version))
      for c in cluster.contexts:
        assert sums[c.owner, c.row] == demanded(cluster, c)

  def test_two_swapped_rblocks_are_noticed(self):
    cluster = spread(4, num_blocks=6)
    hosted = cluster.hosted(ROWS)
    context = cluster.contexts[1]
    holder = context.places[0][0]
    # The table says the right logical number, the pool has other content.
    first = context.places[0][1]
    other = 1 if first != 1 else 2
    tags = cluster.tag.reshape(I, N)
    want = demanded(cluster, context)
    tags[holder, [first, other]] = tags[holder, [other, first]]
    sums = covered(cluster, hosted, cluster.slots())
    assert sums[context.owner, context.row] != want

  def test_the_order_of_a_table_is_part_of_the_proof(self):
    tag = jnp.asarray([0, 11, 22], jnp.uint32)

    def of(blocks):
      return coverage(
        tag,
        BlockTables(
          jnp.asarray(blocks, jnp.int32),
          jnp.asarray([0, 1], jnp.int32),
          jnp.asarray([0], jnp.int32),
          jnp.asarray([2], jnp.int32),
        ),
      )

    assert of([1, 2]) != of([2, 1])

  def test_host_and_device_mix_alike(self):
    rng = np.random.default_rng(0)
    tags = rng.integers(0, 2**32, 100, dtype=np.uint32)
    logical_ids = rng.integers(0, 2**31, 100, dtype=np.int32)
    mixed = mix_tags(jnp.asarray(tags), jnp.asarray(logical_ids))
    for tag, logical_id, got in zip(tags, logical_ids, mixed, strict=True):
      want = content_tag.mix_tag(int(tag), int(logical_id))
      assert int(got) == want


def test_only_shifts_that_carry_something_are_run():
  slots = [empty_slots(I, S) for _ in range(I)]
  slots[3].rows[0] = 0
  slots[3].versions[0, [0, 2]] = 1
  slots[1].rows[1] = NO_ROW
  slots[1].versions[1, 2] = 1
  shifts = [shifts_of_slots(i, mine).tolist() for i, mine in enumerate(slots)]
  nothing = [False] * I
  assert shifts == [nothing, nothing, nothing, [False, True, False, True]]
