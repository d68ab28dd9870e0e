"""Content tags: what an rBlock really holds, in 32 bits.

The program that writes or moves an rBlock writes its tag beside it. A step sums
the *mixed* tags of the rBlocks that it read, and the owner compares that sum
with the one that the request demands (`DESIGN.md` section 5, rule 5). Mixing in
the logical number that the table claims makes two swapped rBlocks visible,
which a plain sum of tags would not show.

This half runs on the host; `cache/kv_pool.py` mixes the same way on the device.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_SEED = 0x9E3779B9
_STEP = 0x7F4A7C15


def _avalanche(x: int) -> int:
  """The finaliser of MurmurHash3: every input bit flips half the output."""
  x &= _MASK
  x ^= x >> 16
  x = (x * 0x85EBCA6B) & _MASK
  x ^= x >> 13
  x = (x * 0xC2B2AE35) & _MASK
  return x ^ (x >> 16)


def content_tag(*, uid: int, logical_id: int, epoch: int, filled: int) -> int:
  """Names the content of one rBlock.

  Args:
    uid: Request that the KV belongs to, uint32.
    logical_id: Number of the rBlock within its request, from 0.
    epoch: Reservation epoch under which the rBlock was granted, uint32.
    filled: How many of its tokens are written.

  Returns:
    A uint32 that is never 0: 0 marks an rBlock with no proven content.
  """
  name = name_block(name_request(uid), logical_id, epoch)
  return tag_content(name, filled)


def name_request(uid: int) -> int:
  """The part of `content_tag` that all rBlocks of a request share."""
  return _add_word(_SEED, uid)


def name_block(request_name: int, logical_id: int, epoch: int) -> int:
  """The part of it that stays as it is while an rBlock fills.

  Args:
    request_name: Of `name_request`.
    logical_id: Number of the rBlock within its request.
    epoch: Reservation epoch under which it was granted.
  """
  return _add_word(_add_word(request_name, logical_id), epoch)


def tag_content(block_name: int, filled: int) -> int:
  """The rest of it.

  Args:
    block_name: Of `name_block`.
    filled: How many tokens of the rBlock are written.

  Returns:
    Its content tag.
  """
  return _add_word(block_name, filled) or 1


def _add_word(name: int, word: int) -> int:
  """Hashes one more word into a name."""
  # `_avalanche` once inside the other, without the calls: this is asked for
  # every rBlock that a step writes.
  x = (word + _STEP) & _MASK
  x ^= x >> 16
  x = (x * 0x85EBCA6B) & _MASK
  x ^= x >> 13
  x = (x * 0xC2B2AE35) & _MASK
  x ^= x >> 16 ^ name
  x ^= x >> 16
  x = (x * 0x85EBCA6B) & _MASK
  x ^= x >> 13
  x = (x * 0xC2B2AE35) & _MASK
  return x ^ (x >> 16)


def content_tags(
  *, uid: int, logical_ids: Sequence[int], epochs: Sequence[int], filled: int
) -> list[int]:
  """`content_tag` of many rBlocks of one request, far faster than one by one.

  Args:
    uid: Request that the KV belongs to, uint32.
    logical_ids: Number of each rBlock within its request.
    epochs: Reservation epoch of each.
    filled: How many tokens are written in each of them.

  Returns:
    As many uint32, none of them 0.
  """
  count = len(epochs)
  tags = np.full(count, _SEED, np.uint32)
  for words in ([uid] * count, logical_ids, epochs, [filled] * count):
    mixed = _avalanches(np.array(words, np.uint32) + np.uint32(_STEP))
    tags = _avalanches(tags ^ mixed)
  return np.maximum(tags, 1).tolist()


def _avalanches(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
  """`_avalanche` of many: products wrap as the mask has them do there."""
  x = x ^ (x >> np.uint32(16))
  x = x * np.uint32(0x85EBCA6B)
  x = x ^ (x >> np.uint32(13))
  x = x * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def mix_tag(tag: int, logical_id: int) -> int:
  """Binds a tag to the logical number under which a table names its rBlock.

  Args:
    tag: Content tag, uint32.
    logical_id: Logical number that the table claims.

  Returns:
    The uint32 that this rBlock adds to a step's coverage (modulo 2**32).
  """
  return _avalanche(tag ^ _avalanche(logical_id + 0x51ED270B))


def add_coverage(a: int, b: int) -> int:
  """Adds two coverage sums, modulo 2**32."""
  return (a + b) & _MASK
