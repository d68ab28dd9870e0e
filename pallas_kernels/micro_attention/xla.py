"""Micro-attention for any backend, in bounded memory.

Two loops share the rows of a call, and `merge` joins them: each query belongs
to one loop, and is empty in the other.

- Rows of one query (decode) are bound by reading KV. Their entries are cut
  into *strips* of about a hundred tokens, and every step of the loop reads a
  fixed number of strips, of whatever rows come next. A long row thus takes
  many steps and short rows share one.
- Longer rows (prefill) are bound by arithmetic. A step of the loop takes a tile
  of queries of one row past a group of its entries, as in FlashAttention.

Both keep the running softmax of FlashAttention in float32, and take time for
the entries that rows really have, not for those that the tables have room for.
A group of entries of which no query of the tile sees any token is not read;
that pays where entries ascend by logical number, and is right in any order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_state import AttentionState, empty_state, merge
from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.pool_layout import NULL_BLOCK_ID, Layer, as_numbers

_STRIP_TOKENS = 128  # KV tokens of one row that one decode strip covers.
_STRIPS_PER_STEP = 16
_TILE_ROWS = 1024  # Query rows, over all heads, of one prefill tile.
_GROUP_TOKENS = 512  # KV tokens that a prefill tile passes in one step.
_NOWHERE = jnp.iinfo(jnp.int32).max  # A KV position that no query sees.

# Float32 products in full on every backend; on GPUs the default is TF32.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Logits:
  """How logits are made of dot products, and which ones count.

  Attributes:
    scale: Multiplier on the dot products.
    sliding_window: How many positions a query sees; None is all.
    soft_cap: `c` in `c * tanh(logit / c)`; None is none.
  """

  scale: float
  sliding_window: int | None
  soft_cap: float | None

  def sees(self, q_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
    """Whether queries see KV tokens; positions broadcast, int32 to bool."""
    return self.range_sees(q_positions, q_positions, kv_positions)

  def range_sees(
    self, first: jax.Array, last: jax.Array, kv_positions: jax.Array
  ) -> jax.Array:
    """Whether any position in `[first, last]` sees KV tokens."""
    sees = kv_positions <= last
    if self.sliding_window is not None:
      sees &= first - kv_positions < self.sliding_window
    return sees

  def of(self, products: jax.Array, sees: jax.Array) -> jax.Array:
    """Float32 logits of dot products; -inf where nothing is seen."""
    logits = products * self.scale
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    return jnp.where(sees, logits, -jnp.inf)


class _Sums(NamedTuple):
  """A softmax under way: sums of `exp(logit - top)`.

  Attributes:
    top: `[...]` float32. Largest logit so far, or -inf.
    total: `[...]` float32. Sum of the weights.
    acc: `[..., D]` float32. Sum of the weighted values.
  """

  top: jax.Array
  total: jax.Array
  acc: jax.Array

  @classmethod
  def zero(cls, shape: tuple[int, ...]) -> "_Sums":
    """Sums over no tokens; `shape` is `[..., D]`."""
    return cls(
      top=jnp.full(shape[:-1], -jnp.inf, jnp.float32),
      total=jnp.zeros(shape[:-1], jnp.float32),
      acc=jnp.zeros(shape, jnp.float32),
    )

  def state(self) -> AttentionState:
    """The attention state over the tokens summed."""
    is_empty = self.total == 0
    total = jnp.where(is_empty, 1.0, self.total)
    lse = jnp.where(is_empty, -jnp.inf, self.top + jnp.log(total))
    return AttentionState(out=self.acc / total[..., None], lse=lse)


def _shift(top: jax.Array) -> jax.Array:
  """What to subtract from logits below `top`: never -inf - -inf."""
  return jnp.where(top == -jnp.inf, 0.0, top)


def micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: Layer,
  tables: BlockTables,
  *,
  scale: float,
  max_query_tokens: int,
  sliding_window: int | None = None,
  logit_soft_cap: float | None = None,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  spared_multiprocessors: int = 0,
) -> AttentionState:
  """Attends each query to the rBlocks of its sequence that are held here.

  Args, results and errors are those of `api.micro_attention`.
  """
  del spared_multiprocessors  # XLA's kernels come and go.
  for name, x in (("q", q), ("kv_pool", kv_pool)):
    if x.dtype == jnp.float64:
      raise NotImplementedError(f"{name}: accumulates in float32, not float64.")
  logits = _Logits(
    scale=float(scale), sliding_window=sliding_window, soft_cap=logit_soft_cap
  )
  return _micro_attention(
    q,
    cu_seqlens,
    q_positions,
    kv_pool,
    jnp.asarray(layer, jnp.int32),
    tables,
    None if k_scale is None else (k_scale, v_scale),
    logits=logits,
    max_query_tokens=int(max_query_tokens),
  )


@functools.partial(jax.jit, static_argnames=("logits", "max_query_tokens"))
def _micro_attention(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  scales: tuple[jax.Array, jax.Array] | None,
  *,
  logits: _Logits,
  max_query_tokens: int,
) -> AttentionState:
  """Jitted so that the layers of a model share one trace."""
  num_tokens, num_q_heads, head_dim = q.shape
  num_kv_heads = kv_pool.shape[3]
  q_by_kv_head = q.astype(jnp.float32).reshape(
    num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim
  )
  # Scales of keys and values are as good on queries and outputs.
  if scales is not None:
    q_by_kv_head *= scales[0][:, None, None]
  args = (q_by_kv_head, cu_seqlens, q_positions, kv_pool, layer, tables, logits)
  state = _attend_single_queries(*args)
  if max_query_tokens > 1:
    state = merge(state, _attend_tiles(*args, max_query_tokens))
  out = state.out if scales is None else state.out * scales[1][:, None, None]
  return AttentionState(
    out=out.reshape(q.shape), lse=state.lse.reshape(q.shape[:2])
  )


def _attend_single_queries(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  logits: _Logits,
) -> AttentionState:
  """Attends the queries of rows that have just one.

  Args:
    q: `[T, K, G, D]` float32, `G` query heads to a KV head.
    cu_seqlens: `[B + 1]` int32.
    q_positions: `[T]` int32.
    kv_pool: `[N, L, 2, K, P, D]`.
    layer: `[]` int32.
    tables: Of `B` rows.
    logits: How logits are made.

  Returns:
    State `[T, K, G, D]`; the queries of all other rows are EMPTY.
  """
  operands = (q, cu_seqlens, q_positions, kv_pool, layer, tables)
  num_tokens = q.shape[0]
  block_size = kv_pool.shape[4]
  num_entries = tables.block_ids.shape[0]
  strip_entries = min(max(1, _STRIP_TOKENS // block_size), num_entries)
  strips_per_step = min(_STRIPS_PER_STEP, num_entries)

  token_of = jnp.clip(cu_seqlens[:-1], 0, num_tokens - 1)  # [B]
  is_single = (cu_seqlens[1:] - cu_seqlens[:-1] == 1) & (
    q_positions[token_of] >= 0
  )
  num_strips = jnp.where(is_single, -(-tables.counts // strip_entries), 0)
  ends = jnp.cumsum(num_strips)  # [B] where each row's strips end

  def read_entries(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query `[W]`, rBlocks `[W, E]` and visibility `[W, E, P]` of step `i`."""
    strip = i * strips_per_step + jnp.arange(strips_per_step)
    row, strip_of_row = _locate(strip, ends, num_strips)
    token = token_of[row]
    entries = strip_of_row[:, None] * strip_entries + jnp.arange(strip_entries)
    is_held = (strip < ends[-1])[:, None] & (entries < tables.counts[row, None])
    entries += tables.starts[row, None]
    block_ids, kv_positions = _entries(tables, entries, is_held, block_size)
    sees = logits.sees(q_positions[token, None, None], kv_positions)
    return token, block_ids, sees

  def is_seen(i: jax.Array) -> jax.Array:
    return jnp.any(read_entries(i)[2])

  def attend(i: jax.Array, sums: _Sums) -> _Sums:
    token, block_ids, sees = read_entries(i)
    k, v = _load(kv_pool, layer, block_ids, sees)  # [W, K, S, D]
    s = _einsum("wkgd,wksd->wkgs", q[token], k)
    s = logits.of(s, sees.reshape(strips_per_step, 1, 1, -1))
    # Strips of one query share its sums, and only queries of this step are
    # touched. Setting one twice is harmless: it is to the same values.
    top = sums.top.at[token].max(jnp.max(s, axis=-1))
    shift = _shift(top[token])
    decay = jnp.exp(sums.top[token] - shift)
    weights = jnp.exp(s - shift[..., None])
    acc = sums.acc.at[token].set(sums.acc[token] * decay[..., None])
    total = sums.total.at[token].set(sums.total[token] * decay)
    return _Sums(
      top=top,
      total=total.at[token].add(jnp.sum(weights, axis=-1)),
      acc=acc.at[token].add(_einsum("wkgs,wksd->wkgd", weights, v)),
    )

  num_steps = -(-ends[-1] // strips_per_step)
  sums = _varying(_Sums.zero(q.shape), operands)
  return _fold(num_steps, is_seen, attend, sums).state()


def _attend_tiles(
  q: jax.Array,
  cu_seqlens: jax.Array,
  q_positions: jax.Array,
  kv_pool: jax.Array,
  layer: jax.Array,
  tables: BlockTables,
  logits: _Logits,
  max_query_tokens: int,
) -> AttentionState:
  """Attends the queries of rows that have more than one.

  Args and results as of `_attend_single_queries`.
  """
  operands = (q, cu_seqlens, q_positions, kv_pool, layer, tables)
  num_tokens, num_kv_heads, group, head_dim = q.shape
  block_size = kv_pool.shape[4]
  num_entries = tables.block_ids.shape[0]
  group_entries = min(max(1, _GROUP_TOKENS // block_size), num_entries)
  tile = max(8, _TILE_ROWS // (num_kv_heads * group))
  tile = min(tile, max_query_tokens)

  lengths = cu_seqlens[1:] - cu_seqlens[:-1]
  num_tiles = jnp.where(lengths > 1, -(-lengths // tile), 0)  # [B]
  ends = jnp.cumsum(num_tiles)

  # Room for the last tile to run over the end: slices would else be shifted.
  q = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))
  q_positions = jnp.pad(q_positions, (0, tile), constant_values=-1)

  def attend_tile(i: jax.Array, state: AttentionState) -> AttentionState:
    row, tile_of_row = _locate(i, ends, num_tiles)
    start = cu_seqlens[row] + tile_of_row * tile
    is_of_row = start + jnp.arange(tile) < cu_seqlens[row + 1]
    positions = lax.dynamic_slice_in_dim(q_positions, start, tile)
    positions = jnp.where(is_of_row, positions, -1)[:, None]  # [tile, 1]
    first = jnp.min(jnp.where(positions < 0, _NOWHERE, positions))
    last = jnp.max(positions)
    q_tile = lax.dynamic_slice_in_dim(q, start, tile)
    q_tile = q_tile.transpose(1, 2, 0, 3)  # [K, G, tile, D]
    count = tables.counts[row]

    def read_entries(j: jax.Array) -> tuple[jax.Array, jax.Array]:
      """Ids `[E]` and positions `[E, P]` of the tile's entries in step `j`."""
      entries = j * group_entries + jnp.arange(group_entries)
      is_held = entries < count
      entries += tables.starts[row]
      return _entries(tables, entries, is_held, block_size)

    def is_seen(j: jax.Array) -> jax.Array:
      return jnp.any(logits.range_sees(first, last, read_entries(j)[1]))

    def attend(j: jax.Array, sums: _Sums) -> _Sums:
      block_ids, kv_positions = read_entries(j)
      sees = logits.sees(positions, kv_positions.reshape(1, -1))  # [tile, S]
      # Fewer operations than any(sees), and any query's position is in between.
      is_in_reach = logits.range_sees(first, last, kv_positions)
      k, v = _load(kv_pool, layer, block_ids[None], is_in_reach[None])
      s = _einsum("kgtd,ksd->kgts", q_tile, k[0])
      s = logits.of(s, sees)
      top = jnp.maximum(sums.top, jnp.max(s, axis=-1))
      shift = _shift(top)
      decay = jnp.exp(sums.top - shift)
      weights = jnp.exp(s - shift[..., None])
      acc = _einsum("kgts,ksd->kgtd", weights, v[0])
      return _Sums(
        top=top,
        total=sums.total * decay + jnp.sum(weights, axis=-1),
        acc=sums.acc * decay[..., None] + acc,
      )

    num_groups = -(-count // group_entries)
    sums = _Sums.zero((num_kv_heads, group, tile, head_dim))
    sums = _varying(sums, operands)
    done = _fold(num_groups, is_seen, attend, sums).state()
    # The part of a tile behind its row's end is EMPTY, and the rows behind are
    # yet to be written.
    return AttentionState(
      out=lax.dynamic_update_slice_in_dim(
        state.out, done.out.transpose(2, 0, 1, 3), start, 0
      ),
      lse=lax.dynamic_update_slice_in_dim(
        state.lse, done.lse.transpose(2, 0, 1), start, 0
      ),
    )

  state = _varying(empty_state(q.shape), operands)
  state = lax.fori_loop(0, ends[-1], attend_tile, state)
  return AttentionState(out=state.out[:num_tokens], lse=state.lse[:num_tokens])


def _locate(
  i: jax.Array, ends: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Finds pieces of work that lie one row after another.

  Args:
    i: `[...]` int32. Numbers of pieces over all rows; may lie past the end.
    ends: `[B]` int32. Cumulative sum of `sizes`.
    sizes: `[B]` int32. Pieces of each row.

  Returns:
    `[...]` int32 twice: the row (some row, past the end), the piece within it.
  """
  row = jnp.searchsorted(ends, i, side="right", method="compare_all")
  row = jnp.minimum(row.astype(jnp.int32), ends.shape[0] - 1)
  return row, i - (ends - sizes)[row]


def _entries(
  tables: BlockTables, entries: jax.Array, is_held: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
  """Reads table entries.

  Args:
    tables: The tables.
    entries: `[...]` int32. Where to read them.
    is_held: `[...]` bool. Whether there is such an entry.
    block_size: Tokens per rBlock, `P`.

  Returns:
    `[...]` int32 ids of rBlocks, and `[..., P]` int32 positions of their
    tokens: `_NOWHERE` for an entry that does not exist or points at the null
    block.
  """
  block_ids = jnp.where(
    is_held,
    tables.block_ids.at[entries].get(mode="clip"),
    NULL_BLOCK_ID,
  )
  first = tables.logical_ids.at[entries].get(mode="clip") * block_size
  positions = first[..., None] + jnp.arange(block_size)
  holds_kv = (block_ids != NULL_BLOCK_ID)[..., None]
  return block_ids, jnp.where(holds_kv, positions, _NOWHERE)


def _load(
  kv_pool: jax.Array,
  layer: jax.Array,
  block_ids: jax.Array,
  is_in_reach: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Copies the keys and values of a bounded number of rBlocks out of the pool.

  Args:
    kv_pool: `[N, L, 2, K, P, D]`.
    layer: `[]` int32.
    block_ids: `[W, E]` int32. Strips of entries.
    is_in_reach: `[W, E, P]` bool. Tokens that queries may see. The others may
      be NaN, and 0 * NaN is NaN, so they become 0.

  Returns:
    Keys and values, `[W, K, E * P, D]` float32.
  """
  num_strips = block_ids.shape[0]
  num_kv_heads, _, head_dim = kv_pool.shape[3:]

  def load(which: int) -> jax.Array:
    x = kv_pool.at[block_ids, layer, which].get(mode="clip")  # [W, E, K, P, D]
    x = as_numbers(x)
    x = jnp.where(is_in_reach[:, :, None, :, None], x.astype(jnp.float32), 0)
    return x.swapaxes(1, 2).reshape(num_strips, num_kv_heads, -1, head_dim)

  return load(0), load(1)


def _fold(
  count: jax.Array,
  is_seen: Callable[[jax.Array], jax.Array],
  attend: Callable[[jax.Array, _Sums], _Sums],
  sums: _Sums,
) -> _Sums:
  """Applies `sums = attend(i, sums)` for each `i < count` that `is_seen(i)`.

  A search for the next step, rather than `lax.cond` in every step: what a loop
  carries is updated in place, what `lax.cond` returns is copied.
  """

  def next_seen(i: jax.Array) -> jax.Array:
    return lax.while_loop(
      lambda i: (i < count) & ~is_seen(i), lambda i: i + 1, i
    )

  def step(carry: tuple[jax.Array, _Sums]) -> tuple[jax.Array, _Sums]:
    i, sums = carry
    return next_seen(i + 1), attend(i, sums)

  start = next_seen(jnp.zeros_like(count))
  return lax.while_loop(lambda carry: carry[0] < count, step, (start, sums))[1]


def _varying[Tree](x: Tree, operands: object) -> Tree:
  """Marks constants as varying over the mesh axes over which operands vary.

  Inside `jax.shard_map`, what a loop carries must vary alike before and after.

  Args:
    x: Pytree of constants.
    operands: Pytree of what the loop combines with them.
  """
  axes = frozenset[str]().union(
    *(
      jax.typeof(leaf).manual_axis_type.varying
      for leaf in jax.tree.leaves(operands)
    )
  )
  return jax.tree.map(
    lambda leaf: lax.pcast(leaf, tuple(axes), to="varying"), x
  )
