"""exchange by one-sided stores over NVLink, for Hopper GPUs of one process.

A block of threads for each peer and piece of a message: it stores the piece
into the peer's mailbox, then counts up the peer's `arrived`; and it waits until
its own is counted up, then copies what came. Plain stores, since a message is
kilobytes; never NVLink multicast.

Counters live as long as the mailbox and only grow. (Pallas' own semaphores are
zeroed by XLA before each kernel, on each device when it gets there: behind the
signal of a faster peer, unless all devices meet before each kernel.) Only the
first call has the devices meet, so that nobody writes into a mailbox before it
is there.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.mailbox import Mailbox, from_words, to_words

_MOST_BLOCKS = 528
"""Blocks that wait at once: four on each multiprocessor, so that all fit."""


def all_gather[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None,
  operand: jax.Array | None,
  *,
  is_first: bool,
) -> tuple[jax.Array, Result | None]:
  """Sends an array to all; the contract is that of `api.all_gather`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  return _exchange(x[None], mailbox, axis_name, beside, operand, is_first)


def all_to_all[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None,
  operand: jax.Array | None,
  *,
  is_first: bool,
) -> tuple[jax.Array, Result | None]:
  """Sends each its part; the contract is that of `api.all_to_all`.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  return _exchange(x, mailbox, axis_name, beside, operand, is_first)


def _exchange[Result](
  x: jax.Array,
  mailbox: Mailbox | None,
  axis_name: Hashable,
  beside: Callable[[jax.Array], Result] | None,
  operand: jax.Array | None,
  is_first: bool,
) -> tuple[jax.Array, Result | None]:
  """Sends `x[i]` to device i, or the only `x[0]` to all."""
  if mailbox is None:
    raise NotImplementedError("mailbox: one from open_mailbox; got None.")
  _, peers, pieces, piece = mailbox.data.shape
  if peers * pieces > _MOST_BLOCKS:
    raise NotImplementedError(
      f"x: at most {_MOST_BLOCKS} pieces for all devices; got {peers * pieces}."
    )
  if jax.process_count() > 1:
    raise NotImplementedError(
      f"axis_name: devices of one process; got {jax.process_count()} processes."
    )
  sent = to_words(x, (pieces, piece))
  run = functools.partial(_run, sent, mailbox, axis_name)
  if beside is None:
    result, out = None, run(sends=True, receives=True, meets=is_first)
  else:
    # For XLA these are kernels like any others, in an order of its own. So what
    # is computed in between goes through the first, and into the second.
    held = jax.new_ref(operand)
    run(sends=True, receives=False, meets=is_first, between=(held,))
    result = beside(jax.freeze(held))
    out = run(
      sends=False,
      receives=True,
      meets=False,
      between=jax.tree.leaves(result)[:1],
    )
  return from_words(out, mailbox), result


def _run(
  sent: jax.Array,
  mailbox: Mailbox,
  axis_name: Hashable,
  *,
  sends: bool,
  receives: bool,
  meets: bool,
  between: Sequence[Any] = (),
) -> Any:
  """Runs the kernel.

  Args:
    sent: `[I or 1, pieces, words of a piece]`.
    mailbox: Of this device.
    axis_name: Axis of the mesh.
    sends: Whether to send.
    receives: Whether to wait for what peers send, and return it.
    meets: Whether all devices are to arrive here before any goes on.
    between: What takes part in the order of things and is left as it is: refs
      where it sends, arrays where it receives.

  Returns:
    `[I, pieces, words of a piece]` if it receives.
  """
  num_between = len(between)

  def body(sent: Any, data: Any, arrived: Any, read: Any, *refs: Any) -> None:
    peer, piece = lax.axis_index("peer"), lax.axis_index("piece")
    me = lax.axis_index(axis_name)
    own = sent.at[peer if sent.shape[0] > 1 else 0, piece]
    count = read[peer, piece]
    half = lax.rem(count, jnp.int32(2))
    if not receives:
      for held in refs[:num_between]:
        _hold(held)
    if sends:

      @pl.when(peer != me)
      def _send() -> None:
        device = {axis_name: peer}
        there = plgpu.remote_ref(data.at[half, me, piece], device)
        there[...] = _load(own)
        _count_up(plgpu.remote_ref(arrived.at[me, piece], device))

    if receives:
      out = refs[num_between].at[peer, piece]

      @pl.when(peer == me)
      def _keep() -> None:
        out[...] = _load(own)

      @pl.when(peer != me)
      def _receive() -> None:
        # Behind the wait nobody reads the old count any more.
        _wait_for(arrived.at[peer, piece], count + 1)
        out[...] = _load(data.at[half, peer, piece])
        read[peer, piece] = count + 1

  shape = (mailbox.data.shape[1], *sent.shape[1:])
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(shape, sent.dtype) if receives else (),
    grid=shape[:2],
    grid_names=("peer", "piece"),
    compiler_params=plgpu.CompilerParams(
      # The only barriers needed are those of the counters.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      skip_device_barrier=not meets,
    ),
    kernel_name="exchange" + "_send" * sends + "_receive" * receives,
  )(sent, mailbox.data, mailbox.arrived, mailbox.read, *between)


def _load(piece: Any) -> jax.Array:
  # By words, not by the widest access: nothing is known of the alignment of a
  # peer's memory, so that wider stores to it would be cut up, each thread's
  # apart from its neighbours'. So a warp's words lie side by side.
  layout = plgpu.Layout.WG_STRIDED(piece.shape, vec_size=1)
  return plgpu.load(piece, layout=layout, optimized=False)


def _hold(ref: Any) -> None:
  """Does nothing to a ref, but counts as writing it."""
  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda *_: None)(ref)


def _count_up(counter: Any) -> None:
  """Adds 1 to a peer's counter, behind all that this block stored there."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def count_up(_: Any, counter: Any) -> None:
    mgpu.utils.warpgroup_barrier()
    mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1)

  count_up(counter)


def _wait_for(counter: Any, count: jax.Array) -> None:
  """Waits until peers have counted a counter up to `count`."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def wait(_: Any, counter: Any, count: Any) -> None:
    reached = mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter))
    reached.wait(count.registers.item(), decrement=False)

  wait(counter, count)
