"""Checksums of rBlocks: the same number from the device and from the host."""

from typing import Any

import jax

_GOLDEN = 0x9E3779B9
_WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}


def checksum(block: Any) -> Any:
  """Sums the bits of an array, mixed with where they stand.

  Two numbers that change places change it, as does one that changes a bit.

  Args:
    block: jax or numpy array of a dtype of 1, 2 or 4 bytes.

  Returns:
    `[]` uint32, of the array's own library.
  """
  xp = block.__array_namespace__()
  words = block.view(_WORDS[block.dtype.itemsize]).reshape(-1)
  place = xp.arange(words.size, dtype=xp.uint32) * xp.uint32(_GOLDEN)
  mixed = words.astype(xp.uint32) + place
  mixed ^= mixed >> 16
  mixed *= xp.uint32(0x85EBCA6B)
  mixed ^= mixed >> 13
  mixed *= xp.uint32(0xC2B2AE35)
  return (mixed ^ (mixed >> 16)).sum(dtype=xp.uint32)


def block_checksums(kv: jax.Array, block_ids: jax.Array) -> jax.Array:
  """Checksums of rBlocks where they lie, whatever packs and unpacks them.

  Args:
    kv: `[N, L, 2, K, P, D]` pool.
    block_ids: `[Q]` int32 rBlocks.

  Returns:
    `[Q]` uint32.
  """
  return jax.vmap(checksum)(kv[block_ids])
