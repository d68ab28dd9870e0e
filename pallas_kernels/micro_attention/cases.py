"""Conformance cases of micro-attention, for tests and benchmarks alike.

A case says everything about its inputs, so that every implementation meets the
same ones. What is out of reach is NaN: the null block, other layers, free
rBlocks, the unwritten end of the last one, tokens outside of every window. An
implementation that reads it shows.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.micro_attention.block_tables import BlockTables
from pallas_kernels.pool_layout import NULL_BLOCK_ID

_LAYER = 1  # Of two: neither the first nor alone, so that indexing shows.
_UNOWNED_ENTRIES = 2  # Between rows, and at the end; they point at NaN.
_BUCKET = 64  # Tables and pool are padded to multiples, to compile less often.


class Inputs(NamedTuple):
  """The arrays of one call, in the order of `micro_attention`'s arguments."""

  q: jax.Array
  cu_seqlens: jax.Array
  q_positions: jax.Array
  kv_pool: jax.Array
  layer: jax.Array
  tables: BlockTables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call of micro-attention.

  Attributes:
    name: Unique among the cases.
    query_lens: Query tokens of each row.
    kv_lens: KV tokens of each row, a multiple of nothing. The queries are the
      last of them.
    num_q_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    block_size: `P`.
    dtype: Of queries, and of the pool unless `kv_dtype` says otherwise.
    kv_dtype: Of the pool; one of 8 bits has scales.
    sliding_window: Positions that a query sees; None is all.
    logit_soft_cap: As for `micro_attention`.
    first_block: Logical number of each row's first rBlock here.
    query_shift: Added to the queries' positions: positive where they lie behind
      all that is held, negative where some of it lies behind them.
    held_stride: Only each n-th rBlock is held here.
    is_permuted: Whether a row's entries stand in random order.
    null_entries: Entries of each row that point at the null block.
    padding_queries: Query tokens behind the last row.
    padding_stride: Within rows, each n-th query is padding; 0 is none.
    query_std: Standard deviation of queries; it scales the logits.
  """

  name: str
  query_lens: tuple[int, ...]
  kv_lens: tuple[int, ...]
  num_q_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 32
  block_size: int = 16
  dtype: str = "float32"
  kv_dtype: str | None = None
  sliding_window: int | None = None
  logit_soft_cap: float | None = None
  first_block: int = 0
  query_shift: int = 0
  held_stride: int = 1
  is_permuted: bool = False
  null_entries: int = 0
  padding_queries: int = 0
  padding_stride: int = 0
  query_std: float = 1.0

  def __post_init__(self):
    if len(self.query_lens) != len(self.kv_lens):
      raise ValueError(
        "kv_lens must be as many as query_lens ="
        f" {len(self.query_lens)}; got {len(self.kv_lens)}."
      )

  def __str__(self) -> str:
    return self.name

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the call."""
    return {
      "scale": self.head_dim**-0.5,
      "max_query_tokens": max(1, *self.query_lens),
      "sliding_window": self.sliding_window,
      "logit_soft_cap": self.logit_soft_cap,
      **self._scales(),
    }

  def on_tensor_cores(self) -> "Case":
    """The case in dtypes and sizes that tensor cores and tiles cover."""
    changes: dict[str, Any] = {}
    if self.dtype == "float32":
      changes["dtype"] = "bfloat16"
    if self.head_dim not in (64, 128, 256):
      changes["head_dim"] = 64
    if self.block_size not in (16, 32, 64, 128):
      changes["block_size"] = 128
    return dataclasses.replace(self, **changes)

  def make_inputs(self, seed: int = 0) -> Inputs:
    """Draws the arrays of the call.

    Args:
      seed: Of the random numbers.

    Returns:
      The arrays, on the default device.
    """
    rng = np.random.default_rng(seed)
    cu_seqlens, q_positions = self._queries()
    tables = self._tables(rng)
    num_blocks = _round_up(int(tables.block_ids.max()) + 1)
    shape = (self.num_kv_heads, self.block_size, self.head_dim)
    pool = np.full((num_blocks, 2, 2, *shape), np.nan, np.float32)
    for row, (start, count) in enumerate(
      zip(tables.starts, tables.counts, strict=True)
    ):
      positions = q_positions[cu_seqlens[row] : cu_seqlens[row + 1]]
      for entry in range(start, start + count):
        if tables.block_ids[entry] == NULL_BLOCK_ID:
          continue
        in_reach = self._in_reach(positions, tables.logical_ids[entry])
        kv = rng.standard_normal((2, *shape))
        kv[:, :, ~in_reach] = np.nan
        pool[tables.block_ids[entry], _LAYER] = kv
    q = rng.standard_normal((len(q_positions), self.num_q_heads, self.head_dim))
    return Inputs(
      q=jnp.asarray(q * self.query_std, self.dtype),
      cu_seqlens=jnp.asarray(cu_seqlens),
      q_positions=jnp.asarray(q_positions),
      kv_pool=jnp.asarray(pool, self.kv_dtype or self.dtype),
      layer=jnp.int32(_LAYER),
      tables=jax.tree.map(jnp.asarray, tables),
    )

  def _scales(self) -> dict[str, jax.Array]:
    """Scales of the pool, of each KV head its own."""
    if self.kv_dtype is None or jnp.dtype(self.kv_dtype).itemsize > 1:
      return {}
    head = jnp.arange(self.num_kv_heads, dtype=jnp.float32)
    return {"k_scale": 0.7 + head / 4, "v_scale": 3 / (head + 2)}

  def _queries(self) -> tuple[np.ndarray, np.ndarray]:
    """Draws `cu_seqlens` and `q_positions`."""
    cu_seqlens = np.cumsum([0, *self.query_lens], dtype=np.int32)
    q_positions = np.full(cu_seqlens[-1] + self.padding_queries, -1, np.int32)
    origin = self.first_block * self.block_size + self.query_shift
    for row, (queries, kv) in enumerate(
      zip(self.query_lens, self.kv_lens, strict=True)
    ):
      positions = origin + kv - queries + np.arange(queries)
      if self.padding_stride:
        positions[:: self.padding_stride] = -1
      q_positions[cu_seqlens[row] : cu_seqlens[row + 1]] = positions
    return cu_seqlens, q_positions

  def _tables(self, rng: np.random.Generator) -> BlockTables:
    """Draws tables of NumPy arrays; the highest id in them is a NaN rBlock."""
    rows = []
    for kv in self.kv_lens:
      logical = np.arange(0, -(-kv // self.block_size), self.held_stride)
      rows.append(rng.permutation(logical) if self.is_permuted else logical)
    num_held = sum(len(row) for row in rows)
    free_ids = iter(1 + rng.permutation(num_held))
    nan_id = num_held + 1
    block_ids, logical_ids, starts, counts = [], [], [], []
    for row in rows:
      entries = [(next(free_ids), self.first_block + i) for i in row]
      for _ in range(self.null_entries if entries else 0):
        place = int(rng.integers(len(entries) + 1))
        entries.insert(place, (NULL_BLOCK_ID, self.first_block))
      starts.append(len(block_ids))
      counts.append(len(entries))
      entries += [(nan_id, self.first_block)] * _UNOWNED_ENTRIES
      block_ids += [block for block, _ in entries]
      logical_ids += [logical for _, logical in entries]
    padding = _round_up(len(block_ids)) - len(block_ids)
    block_ids += [nan_id] * padding
    logical_ids += [self.first_block] * padding
    return BlockTables(
      *(
        np.asarray(x, np.int32)
        for x in (block_ids, logical_ids, starts, counts)
      )
    )

  def _in_reach(self, q_positions: np.ndarray, logical_id: int) -> np.ndarray:
    """Which tokens `[P]` of an rBlock its row's queries may see."""
    kv = logical_id * self.block_size + np.arange(self.block_size)
    q_positions = q_positions[q_positions >= 0]
    if not q_positions.size:
      return np.zeros(self.block_size, bool)
    window = self.sliding_window or np.inf
    return (kv <= q_positions.max()) & (kv > q_positions.min() - window)


def hold(tables: BlockTables, is_held: np.ndarray) -> BlockTables:
  """The tables of a holder that has only some of the entries.

  Args:
    tables: The whole tables, of `E` entries.
    is_held: `[E]` bool. Which entries this holder has.

  Returns:
    Tables of as many entries, each row's held ones first, so that all holders
    share one compiled program.
  """
  block_ids = np.array(tables.block_ids)
  logical_ids = np.array(tables.logical_ids)
  counts = np.array(tables.counts)
  for row, start in enumerate(np.asarray(tables.starts)):
    entries = np.arange(start, start + counts[row])
    held = entries[is_held[entries]]
    counts[row] = len(held)
    for array in (block_ids, logical_ids):
      array[start : start + len(held)] = array[held]
  return tables._replace(
    block_ids=jnp.asarray(block_ids),
    logical_ids=jnp.asarray(logical_ids),
    counts=jnp.asarray(counts),
  )


def _round_up(count: int) -> int:
  return -(-count // _BUCKET) * _BUCKET


_RAGGED = {
  "query_lens": (1, 7, 0, 33, 1, 20),
  "kv_lens": (50, 7, 0, 120, 1, 200),
}
_DECODE = {"query_lens": (1, 1, 0, 1, 1), "kv_lens": (300, 1, 0, 17, 64)}

CASES = (
  Case(name="decode_ragged", **_DECODE),
  Case(name="decode_one_token", query_lens=(1,), kv_lens=(1,)),
  Case(name="decode_long", query_lens=(1, 1), kv_lens=(5000, 3)),
  Case(name="decode_many_rows", query_lens=(1,) * 40, kv_lens=(*range(1, 41),)),
  Case(name="decode_permuted", **_DECODE, is_permuted=True),
  Case(name="decode_padded", **_DECODE, padding_queries=5, null_entries=2),
  Case(name="decode_window", **_DECODE, sliding_window=20),
  Case(name="decode_soft_cap", **_DECODE, logit_soft_cap=2.0, query_std=5.0),
  Case(name="decode_parts_elsewhere", **_DECODE, held_stride=3),
  Case(name="decode_nothing_held", query_lens=(1, 1), kv_lens=(0, 0)),
  Case(name="decode_nothing_seen", **_DECODE, query_shift=-300),
  Case(name="decode_far", **_DECODE, first_block=65_536),
  Case(
    name="decode_far_window",
    query_lens=(1, 1),
    kv_lens=(3000, 100),
    first_block=65_536,
    sliding_window=40,
    is_permuted=True,
  ),
  Case(name="decode_huge_logits", **_DECODE, query_std=1e6),
  Case(name="decode_tiny_logits", **_DECODE, query_std=1e-6),
  Case(
    name="decode_mha_bf16",
    **_DECODE,
    num_kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
  ),
  Case(
    name="decode_mqa_f16",
    **_DECODE,
    num_q_heads=16,
    num_kv_heads=1,
    head_dim=64,
    dtype="float16",
  ),
  Case(
    name="decode_group_71_bf16",
    **_DECODE,
    num_q_heads=71,
    num_kv_heads=1,
    head_dim=64,
    dtype="bfloat16",
  ),
  Case(
    name="decode_group_40_fp8",
    **_DECODE,
    num_q_heads=80,
    num_kv_heads=2,
    head_dim=64,
    dtype="bfloat16",
    kv_dtype="float8_e4m3fn",
    sliding_window=90,
  ),
  Case(
    name="decode_odd_heads_bf16",
    **_DECODE,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    dtype="bfloat16",
  ),
  Case(name="decode_fp8", **_DECODE, kv_dtype="float8_e4m3fn"),
  Case(
    name="decode_fp8_bf16",
    **_DECODE,
    dtype="bfloat16",
    kv_dtype="float8_e4m3fn",
    is_permuted=True,
    null_entries=2,
    sliding_window=90,
  ),
  Case(name="decode_block_8", **_DECODE, block_size=8, head_dim=16),
  Case(name="decode_block_24", **_DECODE, block_size=24),
  Case(name="decode_block_256", **_DECODE, block_size=256, head_dim=256),
  Case(name="prefill_whole", query_lens=(130,), kv_lens=(130,)),
  Case(name="prefill_ragged", **_RAGGED),
  Case(name="prefill_many_tiles", query_lens=(600, 3), kv_lens=(1700, 900)),
  Case(name="prefill_permuted", **_RAGGED, is_permuted=True),
  Case(
    name="prefill_padded",
    **_RAGGED,
    padding_queries=9,
    padding_stride=4,
    null_entries=2,
  ),
  Case(name="prefill_window", **_RAGGED, sliding_window=19),
  Case(
    name="prefill_long_window",
    query_lens=(70, 2),
    kv_lens=(3000, 2000),
    sliding_window=50,
  ),
  Case(name="prefill_soft_cap", **_RAGGED, logit_soft_cap=2.0, query_std=5.0),
  Case(name="prefill_parts_elsewhere", **_RAGGED, held_stride=3),
  Case(name="prefill_hosted", **_RAGGED, query_shift=500),
  Case(name="prefill_nothing_seen", **_RAGGED, query_shift=-200),
  Case(name="prefill_far", **_RAGGED, first_block=65_536, sliding_window=90),
  Case(name="prefill_huge_logits", **_RAGGED, query_std=1e6),
  Case(name="prefill_tiny_logits", **_RAGGED, query_std=1e-6),
  Case(
    name="prefill_mha_bf16",
    **_RAGGED,
    num_kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
  ),
  Case(
    name="prefill_mqa_f16",
    **_RAGGED,
    num_q_heads=16,
    num_kv_heads=1,
    head_dim=64,
    dtype="float16",
  ),
  Case(
    name="prefill_fp8",
    **_RAGGED,
    kv_dtype="float8_e4m3fn",
    logit_soft_cap=3.0,
  ),
  Case(name="prefill_block_8", **_RAGGED, block_size=8, head_dim=16),
  Case(name="prefill_block_256", **_RAGGED, block_size=256, head_dim=256),
)
"""Every case; small enough for the reference and for interpreted kernels."""
