"""How queries and partial states of a decode layer travel between instances.

By XLA's collectives; or by one-sided stores between the devices of one process,
which is a trial: no engine does it, `data_plane_bench` times it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.exchange import api


class DecodeExchange(NamedTuple):
  """What the instances exchange through; as it is, XLA's collectives.

  Attributes:
    queries: Mailbox of `[S, H, D]` queries; None for collectives.
    states: Mailbox of `[S, H, D + 1]` packed states; likewise.
    is_first: Whether nothing was sent through them yet, in this program.
  """

  queries: api.Mailbox | None = None
  states: api.Mailbox | None = None
  is_first: bool = False

  def gather_queries(self, q: jax.Array) -> jax.Array:
    """Sends `[S, H, D]` queries to everybody.

    Collective over axis: "instance".

    Returns:
      `[I * S, H, D]`, those of all instances.
    """
    gathered, _ = api.all_gather(
      q,
      self.queries,
      axis_name=INSTANCE_AXIS,
      is_first=self.is_first,
      implementation=None if self.queries is None else "mosaic_gpu",
    )
    return gathered.reshape(-1, *q.shape[1:])

  def return_states[Result](
    self,
    hosted: AttentionState,
    beside: Callable[[jax.Array], Result],
    operand: jax.Array,
  ) -> tuple[AttentionState, Result]:
    """Sends back what instances computed for each other.

    Collective over axis: "instance".

    Args:
      hosted: Over `[I * S, H, D]`, row `owner * S + slot`.
      beside: What to compute in the meantime.
      operand: What `beside` is computed from.

    Returns:
      State over `[I, S, H, D]`, by the instance that answered; and what
      `beside` returned.
    """
    num_instances = jax.lax.axis_size(INSTANCE_AXIS)
    packed = pack(hosted)
    returned, result = api.all_to_all(
      packed.reshape(num_instances, -1, *packed.shape[1:]),
      self.states,
      axis_name=INSTANCE_AXIS,
      beside=beside,
      operand=operand,
      is_first=self.is_first,
      implementation=None if self.states is None else "mosaic_gpu",
    )
    return unpack(returned), result


def open_mailboxes(
  num_slots: int, num_heads: int, head_dim: int, dtype: DTypeLike
) -> DecodeExchange:
  """Opens mailboxes for all of a program's layers.

  Args:
    num_slots: S.
    num_heads: H.
    head_dim: D.
    dtype: Of queries.
  """
  sizes = num_slots, num_heads
  return DecodeExchange(
    api.open_mailbox((*sizes, head_dim), dtype, INSTANCE_AXIS),
    api.open_mailbox((*sizes, head_dim + 1), jnp.float32, INSTANCE_AXIS),
    is_first=True,
  )


def pack(state: AttentionState) -> jax.Array:
  """`out` and `lse` in one array, so that one collective carries both."""
  return jnp.concatenate([state.out, state.lse[..., None]], axis=-1)


def unpack(packed: jax.Array) -> AttentionState:
  """What `pack` packed."""
  return AttentionState(packed[..., :-1], packed[..., -1])
