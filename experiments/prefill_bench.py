"""The prefill cases of the kernel bench: queries at the end of one context."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

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
    peer_us: Time of the best peer in microseconds, from the anchors.
  """

  query: int
  context: int
  num_q_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  peer_us: float

  @property
  def name(self) -> str:
    """Such as `2048 of 32768`."""
    return f"{self.query} of {self.context}"

  @property
  def flops(self) -> float:
    """Operations on what is seen: two products, a multiply and an add each."""
    seen = self.query * (self.context - self.query)
    seen += self.query * (self.query + 1) / 2
    return 4 * self.num_q_heads * self.head_dim * seen


def bench(
  config: ml_collections.ConfigDict, anchors: Mapping, time_us: TimeUs
) -> list[dict[str, Any]]:
  """Checks and times the prefill kernel in the cases of the anchors.

  Args:
    config: Of the kernel bench; reads `prefill`, and what `time_us` reads.
    anchors: The anchors file.
    time_us: `time_us(config, call, inputs)`, microseconds of one call where
      `call(n, inputs)` makes `n` of them.

  Returns:
    Rows of the bench, one a case.
  """
  rows = []
  for anchor in anchors["prefill"]:
    case = PrefillCase(
      query=anchor["query"],
      context=anchor["context"],
      peer_us=anchor["best_peer_us"],
    )
    inputs = _draw(config, case)

    def call(
      calls: int, inputs: Mapping, case: PrefillCase = case
    ) -> AttentionState:
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

    error = _error(case, inputs, jax.jit(call, static_argnums=0)(1, inputs))
    us = time_us(config, lambda n, x, call=call: call(n, x).lse, inputs)
    tflop_per_s = case.flops / us / 1e6
    rows.append(
      {
        "kernel": "prefill",
        "implementation": _IMPLEMENTATION,
        "case": case.name,
        "time_us": us,
        "tflop_per_s": tflop_per_s,
        "roofline": tflop_per_s / anchors["ceilings"]["gemm_bf16_TFLOP_per_s"],
        "peer": "FlashInfer 0.6.1 FA3 (anchor)",
        "peer_us": case.peer_us,
        "ratio": us / case.peer_us,
        "error": error,
        "correct": error < _TOLERANCE,
      }
    )
    print(
      f"{case.name:28} {_IMPLEMENTATION:28} {us:8.1f} us"
      f" {tflop_per_s:4.0f} TFLOP/s {us / case.peer_us:.3f} of the peer"
      f" error {error:.1e}",
      flush=True,
    )
  return rows


def _draw(
  config: ml_collections.ConfigDict, case: PrefillCase
) -> dict[str, Any]:
  """Random queries, keys, values and rBlock order; the null block is NaN."""
  block_size = config.prefill.block_size
  count = case.context // block_size
  ids = 1 + np.random.default_rng(config.seed).permutation(count)
  kv_key, q_key = jax.random.split(jax.random.key(config.seed))
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
