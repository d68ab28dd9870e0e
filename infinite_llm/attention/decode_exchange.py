"""How queries and partial states of a decode layer travel between instances."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState

_NCCL_BLOCK_BYTES = 16 * 1024
"""What a block of NCCL's sends to one peer; 4, 6 and 11 blocks were seen."""

_MOST_SPARED = 8  # More cost each layer more than waiting costs some.
_FREE_SPARED = 4  # These cost 1 % of local attention at most.


class DecodeExchange(Protocol):
  """What the instances exchange through; stateless, and the same in all layers.

  Engines have `COLLECTIVES`; benches try others.
  """

  def gather_queries(self, q: jax.Array) -> jax.Array:
    """Sends `[S, H, D]` queries to everybody.

    Collective over axis: "instance".

    Returns:
      `[I * S, H, D]`, those of all instances.
    """
    ...

  def return_states[Result](
    self,
    hosted: AttentionState,
    beside: Callable[[jax.Array, int], Result],
    operand: jax.Array,
  ) -> tuple[AttentionState, Result]:
    """Sends back what instances computed for each other.

    Collective over axis: "instance".

    Args:
      hosted: Over `[I * S, H, D]`, row `owner * S + slot`.
      beside: What to compute in the meantime, from `operand` and the number of
        multiprocessors that it is to leave to the exchange.
      operand: What `beside` is computed from.

    Returns:
      State over `[I, S, H, D]`, by the instance that answered; and what
      `beside` returned.
    """
    ...


class _Collectives:
  """Exchange by XLA's collectives, which its scheduler lays beside the rest."""

  def gather_queries(self, q: jax.Array) -> jax.Array:
    """One all_gather."""
    return jax.lax.all_gather(q, INSTANCE_AXIS, tiled=True)

  def return_states[Result](
    self,
    hosted: AttentionState,
    beside: Callable[[jax.Array, int], Result],
    operand: jax.Array,
  ) -> tuple[AttentionState, Result]:
    """One all_to_all."""
    packed = by_owner(pack(hosted), jax.lax.axis_size(INSTANCE_AXIS))
    returned = jax.lax.all_to_all(packed, INSTANCE_AXIS, 0, 0)
    return unpack(returned), beside(operand, _num_spared(packed))


def _num_spared(packed: jax.Array) -> int:
  """Multiprocessors to leave to NCCL's all_to_all of `[I, ...]`.

  A block of NCCL's does not fit beside one of the decode kernel's. It waits for
  a peer while it holds a multiprocessor, whose share of local attention then
  comes last: a fifth more time for that layer (`docs/data_plane.md`).
  """
  num_peers, part_bytes = len(packed), packed.nbytes // len(packed)
  num_blocks = num_peers * -(-part_bytes // _NCCL_BLOCK_BYTES)
  return num_blocks if num_blocks <= _MOST_SPARED else _FREE_SPARED


COLLECTIVES: DecodeExchange = _Collectives()


def by_owner(packed: jax.Array, num_instances: int) -> jax.Array:
  """`[I * S, ...]` as `[I, S, ...]`."""
  return packed.reshape(num_instances, -1, *packed.shape[1:])


def pack(state: AttentionState) -> jax.Array:
  """`out` and `lse` in one array, so that one collective carries both."""
  return jnp.concatenate([state.out, state.lse[..., None]], axis=-1)


def unpack(packed: jax.Array) -> AttentionState:
  """What `pack` packed."""
  return AttentionState(packed[..., :-1], packed[..., -1])
