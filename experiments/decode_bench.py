"""The decode cases of the kernel bench."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import flashinfer_peer
from experiments.kernel_timing import (
  fresh_key,
  poison,
  profiled_us,
  slope_us,
)
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables, micro_attention

_OURS = "mosaic_gpu_decode"
_KERNEL = "micro_attention_decode_mosaic_gpu_kernel"  # On the device.
_FP8 = "float8_e4m3fn"
_LAYERS_BYTES = 12e9  # Of pools: enough layers that no cache holds them.
_TOLERANCE = 4e-3  # Of bf16 outputs, `||out - ref|| / ||ref||`.
_CHECKS = 4  # Pairs of a row and a KV head compared with float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase:
  """One decode step of one layer.

  Attributes:
    contexts: KV tokens of each row.
    num_q_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    query_tokens: Of each row.
    kv_dtype: Of the pool.
    sliding_window: Positions that a query sees; None is all.
  """

  contexts: tuple[int, ...]
  num_q_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  query_tokens: int = 1
  kv_dtype: str = "bfloat16"
  sliding_window: int | None = None

  @property
  def name(self) -> str:
    """Such as `1x524288+63x8192 32/8`, and what is not usual."""
    runs: list[list[int]] = []
    for context in self.contexts:
      if runs and runs[-1][1] == context:
        runs[-1][0] += 1
      else:
        runs.append([1, context])
    mix = "+".join(f"{count}x{context}" for count, context in runs)
    parts = [mix, f"{self.num_q_heads}/{self.num_kv_heads}"]
    if self.query_tokens > 1:
      parts.append(f"{self.query_tokens} queries")
    if self.sliding_window is not None:
      parts.append(f"window {self.sliding_window}")
    if self.kv_dtype == _FP8:
      parts.append("fp8")
    return " ".join(parts)

  @property
  def token_bytes(self) -> int:
    """Bytes of a token's keys and values."""
    itemsize = jnp.dtype(self.kv_dtype).itemsize
    return 2 * self.num_kv_heads * self.head_dim * itemsize

  @property
  def kv_bytes(self) -> int:
    """Bytes of the keys and values that some query sees."""
    reach = self.query_tokens - 1 + (self.sliding_window or max(self.contexts))
    return self.token_bytes * sum(min(reach, n) for n in self.contexts)


def bench(
  config: ml_collections.ConfigDict, anchors: Mapping
) -> Iterator[dict[str, Any]]:
  """Checks and times the decode kernel.

  Args:
    config: Of the kernel bench; reads `decode`, `seed` and `timing`.
    anchors: The anchors file.

  Yields:
    Rows of the bench. The peer of a case with 8 bits is our own with 16.
  """
  known = {_anchor_case(anchor): anchor for anchor in anchors["decode"]}
  ceiling = anchors["ceilings"]["copy_TB_per_s"]
  plain = list(dict.fromkeys([*known, *_sweep(config)]))
  name, peer_times = "", [None] * len(plain)
  if config.decode.peers:
    name, peer_times = flashinfer_peer.times_us(
      "decode",
      [(len(x.contexts), x.contexts[0], *_heads(x), x.head_dim) for x in plain],
    )
  peers = dict(zip(plain, peer_times, strict=True))
  times: dict[DecodeCase, float] = {}
  for case in dict.fromkeys([*plain, *_more_cases(config)]):
    row = _bench_ours(config, case, ceiling)
    times[case] = row["time_us"]
    anchor = known.get(case)
    if anchor:
      row["anchor"] = anchor["peer"]
      row["anchor_us"] = anchor["best_peer_us"]
      row["anchor_ratio"] = row["time_us"] / anchor["best_peer_us"]
      row |= _peer(row, f"{anchor['peer']} (anchor)", anchor["best_peer_us"])
    if peers.get(case):
      row |= _peer(row, name, peers[case])
    wide = dataclasses.replace(case, kv_dtype=config.decode.dtype)
    if wide != case and wide in times:
      row |= _peer(row, f"{_OURS}, {config.decode.dtype}", times[wide])
    _print(row)
    yield row
    if anchor and config.decode.peers:
      yield from _bench_in_tree(config, case, row)


def _heads(case: DecodeCase) -> tuple[int, int]:
  return case.num_q_heads, case.num_kv_heads


def _anchor_case(anchor: Mapping) -> DecodeCase:
  return DecodeCase(
    contexts=(anchor["context"],) * anchor["batch"],
    num_q_heads=anchor["num_q_heads"],
    num_kv_heads=anchor["num_kv_heads"],
    head_dim=anchor["head_dim"],
  )


def _sweep(config: ml_collections.ConfigDict) -> Iterator[DecodeCase]:
  """The cases of the plot: as much KV in rows of every length."""
  for context in config.decode.sweep:
    rows = max(1, config.decode.sweep_tokens // context)
    yield DecodeCase(contexts=(context,) * rows)


def _more_cases(config: ml_collections.ConfigDict) -> Iterator[DecodeCase]:
  """Cases beside those of the anchors and of the plot."""
  for text in config.decode.more:
    mix, heads, *options = text.split()
    contexts: list[int] = []
    for count, context in re.findall(r"(\d+)x(\d+)", mix):
      contexts += [int(context)] * int(count)
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    values = dict(option.split("=") for option in options)
    window = values.get("window")
    yield DecodeCase(
      contexts=tuple(contexts),
      num_q_heads=num_q_heads,
      num_kv_heads=num_kv_heads,
      query_tokens=int(values.get("queries", 1)),
      kv_dtype=values.get("kv", config.decode.dtype),
      sliding_window=None if window is None else int(window),
    )


def _bench_ours(
  config: ml_collections.ConfigDict, case: DecodeCase, ceiling: float
) -> dict[str, Any]:
  """Checks and times our kernel; a row without a peer."""
  inputs = _draw(config, case)
  num_layers = inputs["kv_pool"].shape[1]

  def call(layer: int | jax.Array, inputs: Mapping) -> AttentionState:
    return micro_attention(
      **inputs,
      layer=layer,
      scale=case.head_dim**-0.5,
      max_query_tokens=case.query_tokens,
      sliding_window=case.sliding_window,
      implementation=_OURS,
    )

  poison(inputs["q"].shape)
  state = jax.jit(call, static_argnums=0)(num_layers - 1, inputs)
  error = _error(case, inputs, state, num_layers - 1, config.seed)
  del state

  def call_often(calls: int, args: tuple[Mapping, Sequence]) -> list[jax.Array]:
    inputs, layers = args
    return [call(layer, inputs).lse for layer in layers[:calls]]

  # An argument each: equal calls would be made once.
  layers = [jnp.int32(i % num_layers) for i in range(config.timing.calls[1])]
  times = profiled_us(config, call_often, (inputs, layers), _KERNEL)
  time_us = statistics.median(times)
  return {
    "kernel": "decode",
    "implementation": _OURS,
    "case": case.name,
    "time_us": time_us,
    "time_us_range": [min(times), max(times)],
    "tb_per_s": case.kv_bytes / time_us / 1e6,
    "roofline": case.kv_bytes / time_us / 1e6 / ceiling,
    "kv_bytes": case.kv_bytes,
    "context": max(case.contexts),
    **_peer({}, None, None),
    "error": error,
    "correct": error < _TOLERANCE,
  }


def _peer(
  row: Mapping, peer: str | None, peer_us: float | None
) -> dict[str, Any]:
  ratio = None if peer_us is None else row["time_us"] / peer_us
  return {"peer": peer, "peer_us": peer_us, "ratio": ratio}


def _bench_in_tree(
  config: ml_collections.ConfigDict,
  case: DecodeCase,
  ours: Mapping,
) -> list[dict[str, Any]]:
  """Times JAX's own paged attention, where it covers the case."""
  try:
    from jax.experimental.pallas.ops.gpu import paged_attention as in_tree
  except ImportError:
    return []
  inputs = _draw(config, case)
  pool = inputs.pop("kv_pool")
  pages = [jnp.swapaxes(pool[:, 0, i], 0, 1).copy() for i in range(2)]
  del pool
  tables = inputs["tables"].block_ids.reshape(len(case.contexts), -1)
  lengths = jnp.full((len(case.contexts),), case.contexts[0], jnp.int32)

  def call(calls: int, x: tuple) -> list[jax.Array]:
    q, *rest = x
    outs = []
    for _ in range(calls):
      outs.append(in_tree.paged_attention(q, *rest))
      q = outs[-1]  # Else the calls would be one.
    return outs[-1:]

  try:
    time_us = slope_us(config, call, (inputs["q"], *pages, tables, lengths))
  except Exception as error:  # Whatever it is that the peer cannot do.
    print(f"in-tree paged_attention, {case.name}: {str(error)[:200]}")
    return []
  row = {
    **ours,
    "implementation": "jax in-tree paged_attention",
    "time_us": time_us,
    "tb_per_s": case.kv_bytes / time_us / 1e6,
    "roofline": ours["roofline"] * ours["time_us"] / time_us,
    "time_us_range": None,
    "ratio": time_us / ours["peer_us"],
    "error": None,
    "correct": None,
  }
  _print(row)
  return [row]


def _draw(
  config: ml_collections.ConfigDict, case: DecodeCase
) -> dict[str, Any]:
  """Random queries, keys, values and rBlock order; the null block is NaN."""
  block_size = config.decode.block_size
  counts = np.array([-(-n // block_size) for n in case.contexts])
  starts = np.cumsum(counts) - counts
  rng = np.random.default_rng(config.seed)
  # A table has an entry even where no row has.
  ids = 1 + rng.permutation(max(1, counts.sum()))
  logical = np.concatenate([*(np.arange(n) for n in counts), [0]])[: len(ids)]
  layer_bytes = max(1, sum(case.contexts)) * case.token_bytes
  num_layers = int(np.clip(_LAYERS_BYTES // layer_bytes, 2, 16))
  shape = (
    len(ids) + 1,
    num_layers,
    2,
    case.num_kv_heads,
    block_size,
    case.head_dim,
  )

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, config.decode.dtype).astype(dtype)

  pool_key, q_key = jax.random.split(fresh_key(config))
  pool = jax.jit(lambda pool: pool.at[0].set(jnp.nan), donate_argnums=0)(
    draw(pool_key, shape, case.kv_dtype)
  )
  rows, queries = len(case.contexts), case.query_tokens
  positions = np.asarray(case.contexts)[:, None] - queries + np.arange(queries)
  inputs = {
    "q": draw(
      q_key,
      (rows * queries, case.num_q_heads, case.head_dim),
      config.decode.dtype,
    ),
    "cu_seqlens": jnp.arange(rows + 1, dtype=jnp.int32) * queries,
    "q_positions": jnp.asarray(positions.reshape(-1), jnp.int32),
    "kv_pool": pool,
    "tables": BlockTables(
      *(jnp.asarray(x, jnp.int32) for x in (ids, logical, starts, counts))
    ),
  }
  if case.kv_dtype == _FP8:
    head = jnp.arange(case.num_kv_heads, dtype=jnp.float32)
    inputs |= {"k_scale": 1 + head / 16, "v_scale": 1 - head / 16}
  return inputs


def _error(
  case: DecodeCase, inputs: Mapping, state: Any, layer: int, seed: int
) -> float:
  """Largest error over some rows and KV heads, against float32."""
  rng = np.random.default_rng(seed)
  group = case.num_q_heads // case.num_kv_heads
  tables = inputs["tables"]
  out_all, lse_all = np.asarray(state.out), np.asarray(state.lse)
  if max(case.contexts) == 0:  # Empty states, exactly.
    return float(np.abs(out_all).max() + np.exp(lse_all).max())
  if not np.isfinite(lse_all).all():
    return float("inf")

  @jax.jit
  def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array):
    exact = jax.lax.Precision.HIGHEST
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("gd,sd->gs", q, k, precision=exact)
    logits = jnp.where(seen, logits * case.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    v = jnp.where(seen[:, None], v, 0)
    out = jnp.einsum("gs,sd->gd", weights, v, precision=exact)
    return out, jax.nn.logsumexp(logits, axis=-1)

  worst = 0.0
  for _ in range(_CHECKS):
    token = int(rng.integers(len(inputs["q"])))
    row = token // case.query_tokens
    head = int(rng.integers(case.num_kv_heads))
    start, count = int(tables.starts[row]), int(tables.counts[row])
    ids = tables.block_ids[start : start + count]
    k, v = (
      inputs["kv_pool"][ids, layer, i, head].reshape(-1, case.head_dim)
      for i in range(2)
    )
    if "k_scale" in inputs:
      k = k.astype(jnp.float32) * inputs["k_scale"][head]
      v = v.astype(jnp.float32) * inputs["v_scale"][head]
    heads = slice(head * group, (head + 1) * group)
    behind = int(inputs["q_positions"][token]) - jnp.arange(k.shape[0])
    seen = (behind >= 0) & (behind < (case.sliding_window or 2**31 - 1))
    out, lse = attend(inputs["q"][token, heads], k, v, seen)
    ours, norm = out_all[token, heads], np.linalg.norm(out)
    worst = max(worst, float(np.linalg.norm(ours - out) / norm))
    off = np.abs(lse_all[token, heads] - lse).max()
    worst = max(worst, float(off))
  return worst


def _print(row: Mapping) -> None:
  ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} of the peer"
  error = "" if row["error"] is None else f"error {row['error']:.1e}"
  print(
    f"{row['case']:28} {row['implementation']:28} {row['time_us']:8.1f} us"
    f" {row['tb_per_s']:5.2f} TB/s {ratio} {error}",
    flush=True,
  )
