"""The prefill cases of the kernel bench: queries at the end of one context."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental.pallas.ops.gpu import attention_mgpu

from experiments import flashinfer_peer
from experiments.kernel_timing import fresh_key, poison
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables, micro_attention

_TOLERANCE = 4e-3  # Of bf16 outputs, `||out - ref|| / ||ref||`.
_CHECKED_QUERIES = 64  # The last ones, of one head, against float32.
_NUM_LAYERS = 2
_IMPLEMENTATION = "mosaic_gpu_prefill"

TimeUs = Callable[[ml_collections.ConfigDict, Callable, Any], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCase:
  """A chunk of one sequence, causal, the last of its context.

  Attributes:
    query: Query tokens.
    context: KV tokens, the queries' own included.
    num_q_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    block_size: `P`.
    peer_us: Time of the best peer in microseconds, from the anchors; None where
      they have none.
  """

  query: int
  context: int
  num_q_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  block_size: int
  peer_us: float | None = None

  @property
  def name(self) -> str:
    """Such as `2048 of 32768, P 64`."""
    name = f"{self.query} of {self.context}, P {self.block_size}"
    return name if self.head_dim == 128 else f"{name}, D {self.head_dim}"

  @property
  def flops(self) -> float:
    """Operations on what is seen: two products, a multiply and an add each."""
    seen = self.query * (self.context - self.query)
    seen += self.query * (self.query + 1) / 2
    return 4 * self.num_q_heads * self.head_dim * seen


def bench(
  config: ml_collections.ConfigDict, anchors: Mapping, time_us: TimeUs
) -> Iterator[dict[str, Any]]:
  """Checks and times the prefill kernel, and peers where they cover a case.

  Args:
    config: Of the kernel bench; reads `prefill`, and what `time_us` reads.
    anchors: The anchors file.
    time_us: `time_us(config, call, inputs)`, microseconds of one call where
      `call(n, inputs)` makes `n` of them.

  Yields:
    Rows of the bench, one an implementation and case.
  """
  ceiling = anchors["ceilings"]["gemm_bf16_TFLOP_per_s"]
  cases = _cases(config, anchors)
  peers = _flashinfer(cases) if config.prefill.peers else {}
  for case in cases:
    inputs = _draw(config, case)
    times = {_IMPLEMENTATION: _bench_ours(config, case, inputs, time_us)}
    if config.prefill.peers and case.query == case.context:
      times |= _bench_peers(config, case, inputs, time_us)
    for implementation, (us, error) in times.items():
      row = {
        "kernel": "prefill",
        "implementation": implementation,
        "case": case.name,
        "time_us": us,
        "tflop_per_s": case.flops / us / 1e6,
        "roofline": case.flops / us / 1e6 / ceiling,
        **_peer(us, "FlashInfer 0.6.1 FA3, page 16 (anchor)", case.peer_us),
        "error": error,
        "correct": None if error is None else error < _TOLERANCE,
      }
      if case.peer_us:
        row["anchor_us"] = case.peer_us
        row["anchor_ratio"] = us / case.peer_us
      name, peer_us = peers.get(_flashinfer_case(case), ("", None))
      if peer_us is not None:
        row |= _peer(us, name, peer_us)
      _print(row)
      yield row


def _peer(us: float, name: str, peer_us: float | None) -> dict[str, Any]:
  if peer_us is None:
    return {"peer": None, "peer_us": None, "ratio": None}
  return {"peer": name, "peer_us": peer_us, "ratio": us / peer_us}


def _flashinfer_case(case: PrefillCase) -> flashinfer_peer.Case:
  return (
    case.query,
    case.context,
    case.num_q_heads,
    case.num_kv_heads,
    case.head_dim,
  )


def _flashinfer(
  cases: Sequence[PrefillCase],
) -> dict[flashinfer_peer.Case, tuple[str, float | None]]:
  """Name and microseconds of FlashInfer, where it is there, by its cases."""
  wanted = list(dict.fromkeys(map(_flashinfer_case, cases)))
  name, times = flashinfer_peer.times_us("prefill", wanted)
  return {x: (name, us) for x, us in zip(wanted, times, strict=True)}


def _cases(
  config: ml_collections.ConfigDict, anchors: Mapping
) -> list[PrefillCase]:
  """The anchors' cases for each block size, and those of the config."""
  cases = [
    PrefillCase(
      query=anchor["query"],
      context=anchor["context"],
      block_size=block_size,
      peer_us=anchor["best_peer_us"],
    )
    for block_size in config.prefill.block_sizes
    for anchor in anchors["prefill"]
  ]
  for query, context, head_dim in config.prefill.more:
    cases.append(
      PrefillCase(
        query=query,
        context=context,
        head_dim=head_dim,
        block_size=config.prefill.block_sizes[0],
      )
    )
  return cases


def _bench_ours(
  config: ml_collections.ConfigDict,
  case: PrefillCase,
  inputs: Mapping,
  time_us: TimeUs,
) -> tuple[float, float]:
  """Microseconds of a call, and its error."""

  def call(calls: int, inputs: Mapping) -> AttentionState:
    never = jnp.int32(0)
    for i in range(calls):
      state = micro_attention(
        **inputs,
        layer=i % _NUM_LAYERS + never,
        scale=case.head_dim**-0.5,
        max_query_tokens=case.query,
        implementation=_IMPLEMENTATION,
      )
      # Makes the next call wait for this one; equal calls would be one.
      never = (state.lse[0, 0] > 1e30).astype(jnp.int32)
    return state

  poison(inputs["q"].shape)
  error = _error(case, inputs, jax.jit(call, static_argnums=0)(1, inputs))
  return time_us(config, lambda n, x: call(n, x).lse, inputs), error


def _bench_peers(
  config: ml_collections.ConfigDict,
  case: PrefillCase,
  inputs: Mapping,
  time_us: TimeUs,
) -> dict[str, tuple[float, None]]:
  """Times JAX's own kernels, which see the whole context unpaged."""
  kv = inputs["kv_pool"][inputs["tables"].block_ids, 0]
  kv = jnp.moveaxis(kv, 3, 1).reshape(
    1, case.context, 2, case.num_kv_heads, case.head_dim
  )
  q, k, v = inputs["q"][None], kv[:, :, 0], kv[:, :, 1]
  tuning = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  peers: dict[str, Callable[..., jax.Array]] = {
    "cuDNN through JAX": functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    ),
    "jax in-tree attention_mgpu": functools.partial(
      attention_mgpu.attention, config=tuning
    ),
  }
  times = {}
  for name, attend in peers.items():

    def call(calls: int, x: Any, attend: Any = attend) -> jax.Array:
      q, k, v = x
      for _ in range(calls):
        q = attend(q, k, v)  # Else the calls would be one.
      return q

    try:
      times[name] = time_us(config, call, (q, k, v)), None
    except Exception as error:  # Whatever it is that the peer cannot do.
      print(f"{name}, {case.name}: {str(error)[:200]}", flush=True)
  return times


def _print(row: Mapping) -> None:
  ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} of the peer"
  error = "" if row["error"] is None else f"error {row['error']:.1e}"
  print(
    f"{row['case']:28} {row['implementation']:28} {row['time_us']:8.1f} us"
    f" {row['tflop_per_s']:4.0f} TFLOP/s {ratio} {error}",
    flush=True,
  )


def _draw(
  config: ml_collections.ConfigDict, case: PrefillCase
) -> dict[str, Any]:
  """Random queries, keys, values and rBlock order; the null block is NaN."""
  block_size = case.block_size
  count = case.context // block_size
  ids = 1 + np.random.default_rng(config.seed).permutation(count)
  kv_key, q_key = jax.random.split(fresh_key(config))
  shape = (count + 1, _NUM_LAYERS, 2, case.num_kv_heads, block_size)
  pool = jax.random.normal(kv_key, (*shape, case.head_dim), jnp.bfloat16)
  q_shape = (case.query, case.num_q_heads, case.head_dim)
  return {
    "q": jax.random.normal(q_key, q_shape, jnp.bfloat16),
    "cu_seqlens": jnp.array([0, case.query], jnp.int32),
    "q_positions": jnp.arange(
      case.context - case.query, case.context, dtype=jnp.int32
    ),
    "kv_pool": pool.at[0].set(jnp.nan),
    "tables": BlockTables(
      jnp.asarray(ids, jnp.int32),
      jnp.arange(count, dtype=jnp.int32),
      jnp.zeros(1, jnp.int32),
      jnp.full(1, count, jnp.int32),
    ),
  }


def _error(case: PrefillCase, inputs: Mapping, state: AttentionState) -> float:
  """Error of the last queries of the last head, against float32."""
  if not np.isfinite(np.asarray(state.lse)).all():
    return float("inf")
  exact = jax.lax.Precision.HIGHEST
  q = inputs["q"][-_CHECKED_QUERIES:, -1].astype(jnp.float32)
  kv = inputs["kv_pool"][inputs["tables"].block_ids, 0, :, -1]
  kv = jnp.swapaxes(kv, 0, 1).reshape(2, -1, case.head_dim)
  k, v = kv.astype(jnp.float32)
  logits = jnp.einsum("td,sd->ts", q, k, precision=exact) * case.head_dim**-0.5
  behind = inputs["q_positions"][-_CHECKED_QUERIES:, None] - jnp.arange(
    case.context
  )
  weights = jax.nn.softmax(jnp.where(behind >= 0, logits, -jnp.inf), axis=-1)
  expected = np.asarray(jnp.einsum("ts,sd->td", weights, v, precision=exact))
  out = np.asarray(state.out)[-_CHECKED_QUERIES:, -1]
  return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
