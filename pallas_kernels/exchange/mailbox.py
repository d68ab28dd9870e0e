"""The memory through which devices talk, and how it is kept apart in time."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_THREADS = 128  # Of the warpgroup that carries a piece.
_ROUND = 4  # Words of a thread: a piece has them once to four times.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mailbox:
  """What peers write into, within one program.

  Message n goes into half n % 2. Nobody sends n + 2 before all peers sent n + 1
  to it, and they did so after reading all of message n: so a half is free when
  it is written again, and nobody ever asks.

  Attributes:
    shape: Of a message.
    dtype: Of a message.
    data: `[2, I, pieces, words of a piece]` int32 ref; by half and sender. A
      message is padded to whole pieces.
    arrived: `[I, pieces]` int32 ref: how many came from each device. Its peers
      count it up.
    read: `[I, pieces]` int32 ref: how many of them were read here.
  """

  shape: tuple[int, ...]
  dtype: jnp.dtype
  data: Any
  arrived: Any
  read: Any


def open_mailbox(
  shape: tuple[int, ...], dtype: DTypeLike, axis_name: Hashable
) -> Mailbox:
  """Makes a mailbox, inside `shard_map`, for the rest of the program.

  Args:
    shape: Of a message.
    dtype: Of a message.
    axis_name: Axis of the mesh, of I devices.

  Returns:
    The mailbox, empty.
  """
  peers = jax.lax.axis_size(axis_name)
  dtype = jnp.dtype(dtype)
  pieces = pieces_of(math.prod(shape) * dtype.itemsize)
  none = jnp.zeros((peers, pieces[0]), jnp.int32)
  return Mailbox(
    shape=tuple(shape),
    dtype=dtype,
    data=jax.new_ref(jnp.zeros((2, peers, *pieces), jnp.int32)),
    arrived=jax.new_ref(none),
    read=jax.new_ref(none),
  )


def pieces_of(num_bytes: int) -> tuple[int, int]:
  """How many pieces a message has, and words of each.

  Args:
    num_bytes: Of the message.

  Returns:
    Pieces, and words of 4 bytes of each: small, as what counts is when the last
    one is there, and together as long as the message or longer.
  """
  round_words = _THREADS * _ROUND
  rounds = -(-num_bytes // (4 * round_words))
  per_piece = math.gcd(rounds, 4)
  return rounds // per_piece, per_piece * round_words


def to_words(messages: jax.Array, pieces: tuple[int, int]) -> jax.Array:
  """Messages `[M, ...]` as `[M, pieces, words of a piece]` int32, padded."""
  flat = messages.reshape(len(messages), -1)
  per_word = 4 // flat.dtype.itemsize
  padding = math.prod(pieces) * per_word - flat.shape[1]
  flat = jnp.pad(flat, ((0, 0), (0, padding)))
  if per_word > 1:
    flat = flat.reshape(*flat.shape[:1], -1, per_word)
  words = jax.lax.bitcast_convert_type(flat, jnp.int32)
  return words.reshape(-1, *pieces)


def from_words(words: jax.Array, mailbox: Mailbox) -> jax.Array:
  """`[M, pieces, words of a piece]` int32 as messages `[M, ...]`."""
  flat = jax.lax.bitcast_convert_type(
    words.reshape(len(words), -1), mailbox.dtype
  ).reshape(len(words), -1)
  return flat[:, : math.prod(mailbox.shape)].reshape(-1, *mailbox.shape)
