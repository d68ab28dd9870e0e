"""exchange as XLA's collectives: the specification; needs no mailbox."""

from collections.abc import Callable, Hashable

import jax

from pallas_kernels.exchange.mailbox import Mailbox


def all_gather[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None,
  operand: jax.Array | None,
  *,
  is_first: bool,
) -> tuple[jax.Array, Result | None]:
  """Sends an array to all; the contract is that of `api.all_gather`."""
  del mailbox, is_first
  return jax.lax.all_gather(x, axis_name), beside and beside(operand)


def all_to_all[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None,
  operand: jax.Array | None,
  *,
  is_first: bool,
) -> tuple[jax.Array, Result | None]:
  """Sends each its part; the contract is that of `api.all_to_all`."""
  del mailbox, is_first
  return jax.lax.all_to_all(x, axis_name, 0, 0), beside and beside(operand)
