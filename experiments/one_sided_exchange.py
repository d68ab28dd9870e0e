"""Exchange of a decode layer by one-sided stores: a trial, timed by benches.

Between the devices of one process only. XLA's collectives are the faster on two
GPUs (`docs/data_plane.md`), so engines use those.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from infinite_llm.attention.decode_exchange import by_owner, pack, unpack
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.exchange import api


class OneSidedExchange(NamedTuple):
  """A `DecodeExchange` through mailboxes.

  Attributes:
    queries: Mailbox of `[S, H, D]` queries.
    states: Mailbox of `[S, H, D + 1]` packed states.
    is_first: Whether nothing was sent through them yet, in this program.
  """

  queries: api.Mailbox
  states: api.Mailbox
  is_first: bool

  def gather_queries(self, q: jax.Array) -> jax.Array:
    """As `DecodeExchange` has it."""
    gathered, _ = api.all_gather(
      q,
      self.queries,
      axis_name=INSTANCE_AXIS,
      is_first=self.is_first,
      implementation="mosaic_gpu",
    )
    return gathered.reshape(-1, *q.shape[1:])

  def return_states[Result](
    self,
    hosted: AttentionState,
    beside: Callable[[jax.Array, int], Result],
    operand: jax.Array,
  ) -> tuple[AttentionState, Result]:
    """As `DecodeExchange` has it; `beside` lies between its two kernels.

    So it may have all multiprocessors.
    """
    returned, result = api.all_to_all(
      by_owner(pack(hosted), jax.lax.axis_size(INSTANCE_AXIS)),
      self.states,
      axis_name=INSTANCE_AXIS,
      beside=lambda operand: beside(operand, 0),
      operand=operand,
      is_first=self.is_first,
      implementation="mosaic_gpu",
    )
    return unpack(returned), result


def one_sided_exchanges(
  num_slots: int, num_heads: int, head_dim: int, dtype: DTypeLike
) -> Iterator[OneSidedExchange]:
  """Opens mailboxes for all of a program's layers.

  Args:
    num_slots: S.
    num_heads: H.
    head_dim: D.
    dtype: Of queries.

  Yields:
    What each layer exchanges through, without end.
  """
  sizes = num_slots, num_heads
  queries = api.open_mailbox((*sizes, head_dim), dtype, INSTANCE_AXIS)
  states = api.open_mailbox((*sizes, head_dim + 1), jnp.float32, INSTANCE_AXIS)
  yield OneSidedExchange(queries, states, is_first=True)
  yield from itertools.repeat(OneSidedExchange(queries, states, is_first=False))
