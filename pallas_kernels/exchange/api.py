"""The calls of exchange, checked, whoever answers them.

A trial: no engine uses it. `data_plane_bench` times the implementations beside
each other.
"""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.exchange import mosaic_gpu, xla
from pallas_kernels.exchange.mailbox import Mailbox, open_mailbox
from pallas_kernels.pool_layout import require

__all__ = [
  "ALL_GATHER_IMPLEMENTATIONS",
  "ALL_TO_ALL_IMPLEMENTATIONS",
  "Mailbox",
  "all_gather",
  "all_to_all",
  "open_mailbox",
]

ALL_GATHER_IMPLEMENTATIONS = dispatch.Implementations(
  "exchange.all_gather",
  {"xla": xla.all_gather},
  {"mosaic_gpu": dispatch.on_gpu(mosaic_gpu.all_gather)},
)
ALL_TO_ALL_IMPLEMENTATIONS = dispatch.Implementations(
  "exchange.all_to_all",
  {"xla": xla.all_to_all},
  {"mosaic_gpu": dispatch.on_gpu(mosaic_gpu.all_to_all)},
)


def all_gather[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  *,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None = None,
  operand: jax.Array | None = None,
  is_first: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, Result | None]:
  """Sends an array to all devices of an axis.

  Collective over axis: `axis_name`.

  Args:
    x: `[...]` bfloat16, float32 or int32. The same shape everywhere.
    mailbox: Where peers put theirs; of `x`'s shape and dtype, for calls of this
      function only. Changed. XLA's collective needs none.
    axis_name: Axis of the mesh, of I devices.
    beside: What to compute in the meantime; None is nothing.
    operand: What `beside` is computed from.
    is_first: Whether this is the mailbox's first call of the program.
    implementation: Name of the implementation; None is XLA's collective.

  Returns:
    `[I, ...]`, and what `beside` returned.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the implementation does not cover the call; the
      message names the argument.
  """
  _check(x, mailbox, x.shape)
  return ALL_GATHER_IMPLEMENTATIONS.call(
    implementation, x, mailbox, axis_name, beside, operand, is_first=is_first
  )


def all_to_all[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  *,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None = None,
  operand: jax.Array | None = None,
  is_first: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, Result | None]:
  """Sends each device of an axis its part of an array.

  Collective over axis: `axis_name`.

  Args:
    x: `[I, ...]` bfloat16, float32 or int32. The same shape everywhere.
    mailbox: As for `all_gather`, of the shape of one part.
    axis_name: Axis of the mesh, of I devices.
    beside: What to compute in the meantime; None is nothing.
    operand: What `beside` is computed from.
    is_first: Whether this is the mailbox's first call of the program.
    implementation: Name of the implementation; None is XLA's collective.

  Returns:
    `[I, ...]`, entry i from device i; and what `beside` returned.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the implementation does not cover the call; the
      message names the argument.
  """
  size = jax.lax.axis_size(axis_name)
  require(x.shape[:1] == (size,), "x", f"[{size}, ...]", list(x.shape))
  _check(x, mailbox, x.shape[1:])
  return ALL_TO_ALL_IMPLEMENTATIONS.call(
    implementation, x, mailbox, axis_name, beside, operand, is_first=is_first
  )


def _check(
  x: jax.Array, mailbox: Mailbox | None, shape: tuple[int, ...]
) -> None:
  """The mailbox, if there is one, is for messages like these."""
  dtypes = (jnp.bfloat16, jnp.float32, jnp.int32)
  require(x.dtype in dtypes, "x", "bfloat16, float32 or int32", x.dtype)
  if mailbox is not None:
    require(
      (mailbox.shape, mailbox.dtype) == (shape, x.dtype),
      "mailbox",
      f"for {x.dtype}{list(shape)}",
      f"{mailbox.dtype}{list(mailbox.shape)}",
    )
