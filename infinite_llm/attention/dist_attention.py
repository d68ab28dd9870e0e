"""DistAttention: attention over a context whose rBlocks lie on many instances.

The query travels, the KV stays. An owner names its requests with rBlocks
elsewhere by *spill slot*; every instance holds, per (owner, slot), two versions
of a table of the rBlocks that it hosts, and answers with the version that the
owner names, or with the empty state. Partial states merge exactly (arXiv
2401.02669, section on DistAttention), and so does coverage, the proof of what
was read (`DESIGN.md` section 5).

All runs inside `shard_map` over ("instance", "tensor"). Collectives over
"instance" are here, in `decode_exchange.py` and in `cache/movement.py` alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infinite_llm.attention.decode_exchange import (
  COLLECTIVES,
  DecodeExchange,
  pack,
  unpack,
)
from infinite_llm.cache.kv_pool import coverage
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState, merge, merge_many
from pallas_kernels.micro_attention.api import BlockTables, micro_attention

NO_ROW = -1
"""A spill slot that no row of this step uses."""

NO_VERSION = -1
"""Version of a table that is not installed, or that nobody is asked for."""


class Window(NamedTuple):
  """What a layer's attention looks at; static but for the scales.

  Attributes:
    scale: Multiplier on the logits.
    sliding_window: Most recent tokens that are visible; None is all.
    max_query_tokens: Most query tokens of one sequence in this program.
    implementation: Name of the micro-attention to use; None picks.
    k_scale: `[K]` float32. What each KV head's keys in the pool are multiplied
      by, the same on all instances; None is 1.
    v_scale: `[K]` float32. Likewise for values.
  """

  scale: float
  sliding_window: int | None
  max_query_tokens: int
  implementation: str | None = None
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


class HostedRows(NamedTuple):
  """What one instance hosts for the others: two versions per (owner, slot).

  Row `r = owner * S + slot` of `R = I * S`. The version's parity picks the
  first index, so the previous version stays readable while the next arrives.
  The entries lie among those of the instance's own tables.

  Attributes:
    starts: `[2, R]` int32 where a row's entries start.
    counts: `[2, R]` int32 how many there are.
    version: `[2, R]` int32 version that is installed there, or `NO_VERSION`.
    epoch: `[R]` uint32 epoch of the slot that the row serves.
  """

  starts: jax.Array
  counts: jax.Array
  version: jax.Array
  epoch: jax.Array


class SpillSlots(NamedTuple):
  """The spill slots of one owner in one step; travels to all holders.

  Attributes:
    rows: `[S]` int32 which row of the step is the slot's; `NO_ROW` for none.
    epoch: `[S]` uint32 epoch under which the request holds the slot.
    versions: `[S, I]` int32 table version that each instance is to answer
      with; `NO_VERSION` where it hosts nothing.
  """

  rows: jax.Array
  epoch: jax.Array
  versions: jax.Array


def needed_anywhere(flags: jax.Array) -> jax.Array:
  """What any instance needs, which then all take part in.

  Collective over axis: "instance".

  Args:
    flags: `[F]` bool, what this instance needs.

  Returns:
    `[F]` bool, the same on all instances.
  """
  return jax.lax.pmax(flags.astype(jnp.int32), INSTANCE_AXIS) > 0


def select_hosted(
  hosted: HostedRows,
  tables: BlockTables,
  epoch: jax.Array,
  version: jax.Array,
) -> BlockTables:
  """Picks the tables that owners name; a row that does not match is empty.

  Args:
    hosted: What this instance hosts.
    tables: Tables over the same entries.
    epoch: `[R]` uint32 slot epochs that the owners name.
    version: `[R]` int32 versions that the owners name, or `NO_VERSION`.

  Returns:
    Tables of `R` rows.
  """
  parity, row = version & 1, jnp.arange(version.shape[0])
  matches = (
    (version >= 0)
    & (hosted.version[parity, row] == version)
    & (hosted.epoch == epoch)
  )
  return tables._replace(
    starts=jnp.where(matches, hosted.starts[parity, row], 0),
    counts=jnp.where(matches, hosted.counts[parity, row], 0),
  )


def answer_slots(
  hosted: HostedRows, tables: BlockTables, slots: SpillSlots
) -> BlockTables:
  """Tables with which this instance answers all owners' slots of this step.

  Collective over axis: "instance".

  Args:
    hosted: What this instance hosts.
    tables: Its own tables, over the same entries.
    slots: This instance's own slots, as an owner.

  Returns:
    Tables of `I * S` rows, row `owner * S + slot`.
  """
  me = jax.lax.axis_index(INSTANCE_AXIS)
  named = jnp.where((slots.rows != NO_ROW)[:, None], slots.versions, NO_VERSION)
  epoch, version = jax.lax.all_gather((slots.epoch, named), INSTANCE_AXIS)
  return select_hosted(
    hosted, tables, epoch.reshape(-1), version[:, :, me].reshape(-1)
  )


def asked_positions(positions: jax.Array, slots: SpillSlots) -> jax.Array:
  """Positions of what owners ask in a decode step, the same in all layers.

  Collective over axis: "instance".

  Args:
    positions: `[B]` int32 position of each row of this instance; -1 pads.
    slots: This instance's own slots, as an owner.

  Returns:
    `[I * S]` int32, row `owner * S + slot`; -1 for a slot that is not used.
  """
  used = slots.rows != NO_ROW
  mine = jnp.where(used, positions[jnp.where(used, slots.rows, 0)], -1)
  return jax.lax.all_gather(mine, INSTANCE_AXIS, tiled=True)


def dist_coverage(
  tag: jax.Array,
  tables: BlockTables,
  answered: BlockTables,
  slots: SpillSlots,
  holders: jax.Array | None = None,
) -> jax.Array:
  """Coverage of each row over all holders.

  Collective over axis: "instance".

  Args:
    tag: `[N]` uint32 content tags of this instance's pool.
    tables: Own tables, `B` rows.
    answered: Result of `answer_slots`: rows over the same entries.
    slots: This instance's own slots.
    holders: `[I]` bool as `prefill_attention` takes it: what comes by a shift
      that is not run is not attended, and so not counted. None counts all.

  Returns:
    `[B]` uint32 sums of the mixed tags of all rBlocks that a row reads.
  """
  # Both in one pass, since it goes over the entries of all tables.
  num_rows = tables.starts.shape[0]
  both = tables._replace(
    starts=jnp.concatenate([tables.starts, answered.starts]),
    counts=jnp.concatenate([tables.counts, answered.counts]),
  )
  sums = coverage(tag, both)
  own = sums[:num_rows]
  hosted = sums[num_rows:].reshape(-1, slots.rows.shape[0])
  returned = jax.lax.all_to_all(hosted, INSTANCE_AXIS, 0, 0)
  if holders is not None:
    num_instances = returned.shape[0]
    me = jax.lax.axis_index(INSTANCE_AXIS)
    shift = (jnp.arange(num_instances) - me) % num_instances
    returned = jnp.where(holders[shift][:, None], returned, jnp.uint32(0))
  total = jnp.sum(returned, axis=0, dtype=jnp.uint32)
  # A slot that no row uses adds to one that is not there.
  row = jnp.where(slots.rows == NO_ROW, num_rows, slots.rows)
  return own.at[row].add(total, mode="drop")


def decode_attention(
  q: jax.Array,
  positions: jax.Array,
  kv: jax.Array,
  layer: int,
  tables: BlockTables,
  answered: BlockTables,
  asked: jax.Array,
  slots: SpillSlots,
  window: Window,
  exchange: DecodeExchange = COLLECTIVES,
) -> AttentionState:
  """One layer of a group decode step: one query token per row.

  The slots' queries go to everybody (kilobytes), local attention runs beside
  the exchange, the partial states come back and merge.

  Collective over axis: "instance".

  Args:
    q: `[B, H, D]` queries, one per row.
    positions: `[B]` int32 position of each; -1 pads.
    kv: `[N, L, 2, K, P, D]` pool of this instance.
    layer: Layer of the pool to read.
    tables: Own tables, `B` rows.
    answered: Result of `answer_slots`.
    asked: Result of `asked_positions`.
    slots: This instance's own slots.
    window: What the layer looks at.
    exchange: What to exchange through.

  Returns:
    State over `[B, H, D]`.
  """
  row = jnp.where(slots.rows == NO_ROW, 0, slots.rows)
  sent_q = exchange.gather_queries(q[row])
  # One query token in each row, of its own and of those it answers.
  own_rows, one_each = (
    jnp.arange(len(rows) + 1, dtype=jnp.int32) for rows in (q, sent_q)
  )
  hosted = local_attention(sent_q, one_each, asked, kv, layer, answered, window)
  returned, local = exchange.return_states(
    hosted,
    lambda q, spared: local_attention(
      q, own_rows, positions, kv, layer, tables, window, spared
    ),
    q,
  )
  mine = AttentionState(local.out[row], local.lse[row])
  merged = merge(mine, merge_many(returned))
  # Each row looks for its slot, rather than each slot writing its row: what
  # uses the result then takes part in one kernel of XLA's, as no scatter does.
  slot, has_slot = _slot_of_row(slots.rows, len(q))
  return AttentionState(
    jnp.where(has_slot[:, None, None], merged.out[slot], local.out),
    jnp.where(has_slot[:, None], merged.lse[slot], local.lse),
  )


def prefill_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  positions: jax.Array,
  kv: jax.Array,
  layer: int,
  tables: BlockTables,
  answered: BlockTables,
  slots: SpillSlots,
  holders: jax.Array | None,
  window: Window,
) -> AttentionState:
  """One layer of a group prefill chunk, passed from instance to instance.

  By shifts (i -> i + s). A chunk is megabytes, so one that no owner needs is
  left out by all alike.

  Collective over axis: "instance".

  Args:
    q: `[T, H, D]` queries of at most one spilled sequence, in row 0.
    cu_seqlens: `[B + 1]` int32 where each sequence's queries start.
    positions: `[T]` int32; -1 pads.
    kv: `[N, L, 2, K, P, D]` pool of this instance.
    layer: Layer of the pool to read.
    tables: Own tables, `B` rows.
    answered: Result of `answer_slots`.
    slots: This instance's own slots; at most one is used.
    holders: `[I]` bool. Entry s: some owner i has rBlocks on i + s. The same
      on all instances, since it decides which collectives run; None runs all.
    window: What the layer looks at.

  Returns:
    State over `[T, H, D]`.
  """
  num_instances = jax.lax.axis_size(INSTANCE_AXIS)
  num_slots = slots.rows.shape[0]
  me = jax.lax.axis_index(INSTANCE_AXIS)
  slot = jnp.argmax(slots.rows != NO_ROW).astype(jnp.int32)
  whole = jnp.asarray([0, q.shape[0]], jnp.int32)
  state = local_attention(q, cu_seqlens, positions, kv, layer, tables, window)

  def through(shift: int) -> Callable[[AttentionState], AttentionState]:
    forth = [(i, (i + shift) % num_instances) for i in range(num_instances)]
    back = [(j, i) for i, j in forth]

    def visit(state: AttentionState) -> AttentionState:
      sent_q, sent_positions, sent_slot = jax.lax.ppermute(
        (q, positions, slot), INSTANCE_AXIS, forth
      )
      owner = (me - shift) % num_instances
      row = owner * num_slots + sent_slot
      hosted = local_attention(
        sent_q,
        whole,
        sent_positions,
        kv,
        layer,
        answered._replace(
          starts=answered.starts[row][None], counts=answered.counts[row][None]
        ),
        window,
      )
      returned = jax.lax.ppermute(pack(hosted), INSTANCE_AXIS, back)
      return merge(state, unpack(returned))

    return visit

  for shift in range(1, num_instances):
    if holders is None:
      state = through(shift)(state)
    else:
      state = jax.lax.cond(holders[shift], through(shift), lambda s: s, state)
  return state


def local_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  positions: jax.Array,
  kv: jax.Array,
  layer: int,
  tables: BlockTables,
  window: Window,
  num_spared: int = 0,
) -> AttentionState:
  """Attention over rBlocks held here; no collective.

  Args:
    q: `[T, H, D]` queries of all rows, one after another.
    cu_seqlens: `[B + 1]` int32 where each row's queries start.
    positions: `[T]` int32; -1 pads.
    kv: `[N, L, 2, K, P, D]` pool of this instance.
    layer: Layer of the pool to read.
    tables: Tables of `B` rows.
    window: What the layer looks at.
    num_spared: Multiprocessors that are left to what runs beside it.

  Returns:
    State over `[T, H, D]`.
  """
  return micro_attention(
    q,
    cu_seqlens,
    positions,
    kv,
    layer,
    tables,
    scale=window.scale,
    max_query_tokens=window.max_query_tokens,
    sliding_window=window.sliding_window,
    k_scale=window.k_scale,
    v_scale=window.v_scale,
    spared_multiprocessors=num_spared,
    implementation=window.implementation,
  )


def _slot_of_row(rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """`[B]` int32 the slot that each row has, or any, and `[B]` bool: has one."""
  is_its = rows == jnp.arange(num_rows, dtype=rows.dtype)[:, None]
  return jnp.argmax(is_its, axis=1), jnp.any(is_its, axis=1)
