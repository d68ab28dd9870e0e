"""JAX's own attention in bfloat16, which kernels are no less exact than."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention import reference
from pallas_kernels.micro_attention.cases import Case, Inputs
from tests.tolerances import relative_error

_MOST = 1.2  # Times the error of JAX's.


def assert_as_exact_as_unpaged(
  case: Case, state: AttentionState, inputs: Inputs
) -> None:
  """Compares errors against float32 of the same inputs.

  Args:
    case: Of one row, of one query token or of as many as its KV tokens, which
      are whole rBlocks.
    state: What the kernel gave.
    inputs: Of the case.
  """
  exact = inputs._replace(
    q=inputs.q.astype(jnp.float32), kv_pool=inputs.kv_pool.astype(jnp.float32)
  )
  with jax.default_matmul_precision("highest"):
    expected = reference.micro_attention(*exact, **case.options).out
  ids = inputs.tables.block_ids[: case.kv_lens[0] // case.block_size]
  kv = inputs.kv_pool[ids, inputs.layer]  # [E, 2, K, P, D]
  kv = jnp.transpose(kv, (1, 0, 3, 2, 4))
  k, v = kv.reshape(2, 1, -1, case.num_kv_heads, case.head_dim)
  unpaged = jax.nn.dot_product_attention(
    inputs.q[None],
    k,
    v,
    is_causal=case.query_lens[0] > 1,
    implementation="xla",
  )[0]
  error = relative_error(unpaged, expected)
  assert 1e-4 < error < 1e-2  # So it is the same attention, rounded.
  assert relative_error(state.out, expected) <= _MOST * error
