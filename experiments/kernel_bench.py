"""Attention kernels on one GPU: right first, then timed, beside their peers.

A kernel's time is the slope over how often one program calls it, so that
neither the host nor the launch of the program is in it; what all layers of a
model share, such as the cut of the work, is computed once per program and thus
not in it either.
"""

import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
from matplotlib import figure

from experiments import copy_bench, prefill_bench
from infinite_llm.errors import ConfigError
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables, micro_attention

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
    peer: Name of the best peer; empty is none.
    peer_us: Its time in microseconds, from the anchors.
  """

  contexts: tuple[int, ...]
  num_q_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  peer: str = ""
  peer_us: float | None = None

  @property
  def name(self) -> str:
    """Such as `1x524288+63x8192 32/8`."""
    runs: list[list[int]] = []
    for context in self.contexts:
      if runs and runs[-1][1] == context:
        runs[-1][0] += 1
      else:
        runs.append([1, context])
    mix = "+".join(f"{count}x{context}" for count, context in runs)
    return f"{mix} {self.num_q_heads}/{self.num_kv_heads}"

  @property
  def kv_bytes(self) -> int:
    """Bytes of keys and values, in 16 bits each."""
    return sum(self.contexts) * self.num_kv_heads * self.head_dim * 4


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Mapping:
  """Times every case; writes `rows.json` and the plot.

  Args:
    config: See `configs/kernel_bench.py`.
    workdir: Where the files go.

  Returns:
    `rows`, one a kernel and case, and whether all were `correct`.
  """
  if jax.default_backend() != "gpu":
    raise ConfigError(
      f"kernel_bench must run on a GPU; got {jax.default_backend()}."
    )
  anchors = json.loads(pathlib.Path(config.anchors).read_text("utf-8"))
  rows: list[dict[str, Any]] = []
  if config.decode.run:
    for case in _decode_cases(config, anchors):
      rows += _bench_decode(config, case, anchors["ceilings"])
      _write(workdir / "rows.json", rows)
    _plot(rows, workdir / "decode.png")
  for part, bench in (
    (config.prefill, prefill_bench.bench),
    (config.copies, copy_bench.bench),
  ):
    for row in bench(config, anchors, _time_us) if part.run else ():
      rows.append(row)
      _write(workdir / "rows.json", rows)
  correct = all(row["correct"] is not False for row in rows)
  return {"rows": rows, "correct": correct}


def _decode_cases(
  config: ml_collections.ConfigDict, anchors: Mapping
) -> list[DecodeCase]:
  cases = [
    DecodeCase(
      contexts=(anchor["context"],) * anchor["batch"],
      num_q_heads=anchor["num_q_heads"],
      num_kv_heads=anchor["num_kv_heads"],
      head_dim=anchor["head_dim"],
      peer=anchor["peer"],
      peer_us=anchor["best_peer_us"],
    )
    for anchor in anchors["decode"]
  ]
  for mix in config.decode.mixes:
    contexts: list[int] = []
    for count, context in re.findall(r"(\d+)x(\d+)", mix):
      contexts += [int(context)] * int(count)
    cases.append(DecodeCase(contexts=tuple(contexts)))
  known = {case.name for case in cases}
  for context in config.decode.sweep:
    rows = max(1, config.decode.sweep_tokens // context)
    case = DecodeCase(contexts=(context,) * rows)
    if case.name not in known:
      cases.append(case)
  return cases


def _bench_decode(
  config: ml_collections.ConfigDict, case: DecodeCase, ceilings: Mapping
) -> list[dict[str, Any]]:
  """Checks and times our kernel, and the in-tree one if asked for."""
  inputs = _draw(config, case)
  num_layers = inputs["kv_pool"].shape[1]

  def call(layer: int | jax.Array, inputs: Mapping) -> AttentionState:
    return micro_attention(
      **inputs,
      layer=layer,
      scale=case.head_dim**-0.5,
      max_query_tokens=1,
      implementation="mosaic_gpu_decode",
    )

  _poison(inputs["q"].shape)
  state = jax.jit(call, static_argnums=0)(num_layers - 1, inputs)
  error = _error(case, inputs, state, num_layers - 1, config.seed)
  del state

  def call_often(calls: int, inputs: Mapping) -> jax.Array:
    never = jnp.int32(0)
    for i in range(calls):
      state = call(i % num_layers + never, inputs)
      # Makes the next call wait for this one, at the price of a tiny kernel;
      # equal calls would else be made once.
      never = (state.lse[0, 0] > 1e30).astype(jnp.int32)
    return state.lse

  time_us = _time_us(config, call_often, inputs)
  row = {
    "kernel": "decode",
    "implementation": "mosaic_gpu_decode",
    "case": case.name,
    "time_us": time_us,
    "tb_per_s": case.kv_bytes / time_us / 1e6,
    "roofline": case.kv_bytes / time_us / 1e6 / ceilings["copy_TB_per_s"],
    "kv_bytes": case.kv_bytes,
    "context": max(case.contexts),
    "peer": f"{case.peer} (anchor)" if case.peer else None,
    "peer_us": case.peer_us,
    "ratio": time_us / case.peer_us if case.peer_us else None,
    "error": error,
    "correct": error < _TOLERANCE,
  }
  _print(row)
  rows = [row]
  if config.decode.peers:
    rows += _bench_in_tree(config, case, inputs, row)
  return rows


def _bench_in_tree(
  config: ml_collections.ConfigDict,
  case: DecodeCase,
  inputs: dict[str, Any],
  ours: Mapping,
) -> list[dict[str, Any]]:
  """Times JAX's own paged attention, where it covers the case."""
  if len(set(case.contexts)) > 1:
    return []
  try:
    from jax.experimental.pallas.ops.gpu import paged_attention as in_tree
  except ImportError:
    return []
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
    time_us = _time_us(config, call, (inputs["q"], *pages, tables, lengths))
  except Exception as error:  # Whatever it is that the peer cannot do.
    print(f"in-tree paged_attention, {case.name}: {str(error)[:200]}")
    return []
  row = {
    **ours,
    "implementation": "jax in-tree paged_attention",
    "time_us": time_us,
    "tb_per_s": case.kv_bytes / time_us / 1e6,
    "roofline": ours["roofline"] * ours["time_us"] / time_us,
    "ratio": time_us / case.peer_us if case.peer_us else None,
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
  ids = 1 + rng.permutation(counts.sum())
  logical = np.concatenate([np.arange(n) for n in counts])
  num_layers = int(np.clip(_LAYERS_BYTES // case.kv_bytes, 2, 16))
  shape = (
    len(ids) + 1,
    num_layers,
    2,
    case.num_kv_heads,
    block_size,
    case.head_dim,
  )

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, config.decode.dtype)

  # Of fresh bits every run: no kernel may live on the numbers of the last.
  key = jax.random.key(time.time_ns() % 2**32 + config.seed)
  pool_key, q_key = jax.random.split(key)
  pool = jax.jit(lambda pool: pool.at[0].set(jnp.nan), donate_argnums=0)(
    draw(pool_key, shape)
  )
  rows = len(case.contexts)
  return {
    "q": draw(q_key, (rows, case.num_q_heads, case.head_dim)),
    "cu_seqlens": jnp.arange(rows + 1, dtype=jnp.int32),
    "q_positions": jnp.asarray(case.contexts, jnp.int32) - 1,
    "kv_pool": pool,
    "tables": BlockTables(
      *(jnp.asarray(x, jnp.int32) for x in (ids, logical, starts, counts))
    ),
  }


def _poison(shape: Sequence[int]) -> None:
  """Fills the memory that outputs will get with NaN."""
  for _ in range(4):
    jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.float32))


def _error(
  case: DecodeCase, inputs: Mapping, state: Any, layer: int, seed: int
) -> float:
  """Largest error over some rows and KV heads, against float32."""
  rng = np.random.default_rng(seed)
  group = case.num_q_heads // case.num_kv_heads
  tables = inputs["tables"]
  if not np.isfinite(np.asarray(state.lse)).all():
    return float("inf")

  @jax.jit
  def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array):
    exact = jax.lax.Precision.HIGHEST
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("gd,sd->gs", q, k, precision=exact)
    logits = jnp.where(seen, logits * case.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("gs,sd->gd", weights, v, precision=exact)
    return out, jax.nn.logsumexp(logits, axis=-1)

  worst = 0.0
  for _ in range(_CHECKS):
    row = int(rng.integers(len(case.contexts)))
    head = int(rng.integers(case.num_kv_heads))
    start, count = int(tables.starts[row]), int(tables.counts[row])
    ids = tables.block_ids[start : start + count]
    k, v = (
      inputs["kv_pool"][ids, layer, i, head].reshape(-1, case.head_dim)
      for i in range(2)
    )
    heads = slice(head * group, (head + 1) * group)
    seen = jnp.arange(k.shape[0]) < case.contexts[row]
    out, lse = attend(inputs["q"][row, heads], k, v, seen)
    ours, norm = np.asarray(state.out[row, heads]), np.linalg.norm(out)
    worst = max(worst, float(np.linalg.norm(ours - out) / norm))
    off = np.abs(np.asarray(state.lse[row, heads]) - lse).max()
    worst = max(worst, float(off))
  return worst


def _time_us(
  config: ml_collections.ConfigDict,
  call: Callable[[int, Any], Any],
  inputs: Any,
) -> float:
  """Microseconds of one call: median slope over calls in one program."""
  few, many = config.timing.calls
  programs = [jax.jit(functools.partial(call, n)) for n in (few, many)]
  for program in programs:
    jax.block_until_ready(program(inputs))
  slopes = []
  for _ in range(config.timing.repeats):
    elapsed = []
    for program in programs:
      started = time.perf_counter()
      jax.block_until_ready(program(inputs))
      elapsed.append(time.perf_counter() - started)
    slopes.append((elapsed[1] - elapsed[0]) / (many - few) * 1e6)
  return statistics.median(slopes)


def _print(row: Mapping) -> None:
  ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} of the peer"
  error = "" if row["error"] is None else f"error {row['error']:.1e}"
  print(
    f"{row['case']:28} {row['implementation']:28} {row['time_us']:8.1f} us"
    f" {row['tb_per_s']:5.2f} TB/s {ratio} {error}",
    flush=True,
  )


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Achieved bandwidth against context length, peers beside it."""
  matplotlib.use("agg")
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  cases = [row for row in rows if row["case"].endswith(" 32/8")]
  cases = [row for row in cases if "+" not in row["case"]]
  for name in dict.fromkeys(row["implementation"] for row in cases):
    line = sorted(
      (row["context"], row["tb_per_s"])
      for row in cases
      if row["implementation"] == name
    )
    axes.plot(*zip(*line, strict=True), "o-", label=name)
  anchors = {
    (row["context"], row["kv_bytes"] / row["peer_us"] / 1e6)
    for row in cases
    if row["peer_us"]
  }
  if anchors:
    axes.plot(
      *zip(*sorted(anchors), strict=True), "kx", label="best peer (anchor)"
    )
  axes.set_xscale("log", base=2)
  axes.set_ylim(bottom=0)
  axes.set_xlabel("context, tokens per row")
  axes.set_ylabel("KV read, TB/s")
  axes.set_title("Decode micro-attention, 32 query and 8 KV heads")
  axes.grid(alpha=0.3)
  axes.legend()
  canvas.savefig(path, dpi=150)
