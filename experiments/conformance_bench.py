"""The shared conformance cases, by each kernel that covers them, on the device.

Small as they are, what they cost is mostly what any call costs.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.kernel_timing import busy_us, named_bytes, poison
from infinite_llm.errors import ConfigError
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention import reference
from pallas_kernels.micro_attention.api import micro_attention
from pallas_kernels.micro_attention.cases import CASES, Case, Inputs

_KERNELS = ("mosaic_gpu_decode", "mosaic_gpu_prefill")
_TOLERANCE = 4e-3  # Of outputs, `||out - ref|| / ||ref||`; of sums, relative.
_PROGRAMS = 9


def bench(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """Checks and times every case that some kernel covers.

  Args:
    config: Of the kernel bench; reads `seed` and `conformance`.

  Yields:
    Rows of the bench; a kernel's peer is the other one, if that covers the
    case.

  Raises:
    ConfigError: If there is no such part.
  """
  part, parts = config.conformance.part
  if not 0 <= part < parts:
    raise ConfigError(
      f"conformance.part must be (part, parts), 0 <= part < parts; got"
      f" {config.conformance.part}."
    )
  for case in CASES[part::parts]:
    case = case.on_tensor_cores()
    inputs = case.make_inputs(config.seed)
    expected = _expected(case, inputs)
    rows = []
    for name in _KERNELS:
      try:
        rows.append(_row(case, inputs, expected, name))
      except NotImplementedError as error:
        print(f"{case.name:28} {name:20} {error}", flush=True)
    for row, other in zip(rows, rows[::-1], strict=True):
      peer = {"peer": None, "peer_us": None, "ratio": None}
      if other is not row:
        peer = {
          "peer": other["implementation"],
          "peer_us": other["time_us"],
          "ratio": row["time_us"] / other["time_us"],
        }
      yield {**row, **peer}


def _expected(case: Case, inputs: Inputs) -> AttentionState:
  """The state in float64, of what the kernels see; on the host."""
  host = jax.devices("cpu")[0]
  with jax.enable_x64(True), jax.default_device(host):
    inputs = jax.tree.map(np.asarray, inputs)
    q = jnp.asarray(inputs.q, jnp.float64)
    state = reference.micro_attention(*inputs._replace(q=q), **case.options)
    return jax.tree.map(np.asarray, state)


def _row(
  case: Case, inputs: Inputs, expected: AttentionState, name: str
) -> dict[str, Any]:
  @jax.jit
  def call(inputs: Inputs) -> AttentionState:
    return micro_attention(*inputs, **case.options, implementation=name)

  poison(inputs.q.shape)
  error = _error(call(inputs), expected)
  us = busy_us(call, inputs, calls=1, programs=_PROGRAMS)
  print(f"{case.name:28} {name:20} {us:8.1f} us error {error:.1e}", flush=True)
  return {
    "kernel": "conformance",
    "implementation": name,
    "case": case.name,
    "time_us": us,
    "tb_per_s": named_bytes(inputs.kv_pool, inputs.tables) / us / 1e6,
    "error": error,
    "correct": error < _TOLERANCE,
  }


def _error(state: AttentionState, expected: AttentionState) -> float:
  """The larger error, of outputs or of sums; infinite for another emptiness."""
  out, lse = (np.asarray(x, np.float64) for x in (state.out, state.lse))
  is_empty = np.isneginf(expected.lse)
  if (np.isneginf(lse) != is_empty).any() or out[is_empty].any():
    return float("inf")
  lse, exact = lse[~is_empty], expected.lse[~is_empty]
  off = np.abs(lse - exact) / np.maximum(1.0, np.abs(exact))
  norm = np.linalg.norm(expected.out) or 1.0
  relative = np.linalg.norm(out - expected.out) / norm
  return float(np.max([relative, off.max(initial=0.0)]))  # NaN, if one is.
