"""Words of the host arrive, and are held until they have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.cache import host_words
from infinite_llm.cache.host_words import Unread, put_words
from infinite_llm.distributed.mesh import make_mesh, row_mesh


class _Array:
  def __init__(self):
    self.is_there = False

  def is_ready(self):
    return self.is_there


def _words(i: int, width: int) -> np.ndarray:
  return np.full((1, width), i, np.int32) + np.arange(width, dtype=np.int32)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("is_far", [False, True])
def test_words_are_on_all_devices_of_their_instance(monkeypatch, is_far, ranks):
  monkeypatch.setattr(host_words, "_is_far", lambda row: is_far)
  row = row_mesh(make_mesh(2, ranks), 1)
  for i in range(3):
    placed = put_words(_words(i, 1024), row)
    assert placed.sharding.memory_kind == "device"
    shards = placed.addressable_shards
    assert [shard.device for shard in shards] == row.devices.flatten().tolist()
    for shard in shards:
      np.testing.assert_array_equal(shard.data, _words(i, 1024))


def test_what_was_not_read_is_held_and_nothing_else():
  unread, fetched = Unread(), [_Array() for _ in range(4)]
  for i in range(3):
    unread.add(_Array(), fetched[i])
  assert len(unread) == 3

  fetched[1].is_there = True  # Said of it before it is said of the first.
  unread.add(_Array(), fetched[3])
  assert len(unread) == 4
  fetched[0].is_there = fetched[2].is_there = True
  last = _Array()
  unread.add(_Array(), last)
  assert len(unread) == 2
  last.is_there = fetched[3].is_there = True
  there = _Array()
  there.is_there = True
  unread.add(_Array(), there)
  assert len(unread) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 65536])
def test_words_behind_a_long_program_are_not_written_over(width):
  """JAX gives their memory to the next ones while nobody has read them."""
  row = make_mesh(1, 1)

  @jax.jit
  def compute(x):
    return jax.lax.fori_loop(0, 200, lambda _, y: y @ x, x)

  x = jnp.zeros((4096, 4096), jnp.bfloat16)
  put_words(_words(0, width), row)
  jax.block_until_ready(compute(x))
  computed = compute(x)
  placed = [put_words(_words(i, width), row) for i in range(12)]
  assert not computed.is_ready()
  for i, words in enumerate(placed):
    np.testing.assert_array_equal(words, _words(i, width))
