"""Placing and transferring shard by shard is what `jax.device_put` does."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.cache.global_arrays import place, transfer, transfer_shards
from infinite_llm.distributed.mesh import make_mesh


@pytest.fixture(name="sharding")
def _sharding():
  return NamedSharding(make_mesh(2, 2), PartitionSpec("instance", "tensor"))


def values(count):
  return [np.arange(8 * n, 8 * (n + 1)).reshape(4, 2) for n in range(count)]


@pytest.mark.parametrize("move", [transfer, transfer_shards])
def test_arrays_go_to_host_memory_and_back(sharding, move):
  host = sharding.with_memory_kind("pinned_host")
  arrays = place(values(3), sharding)

  there = move(arrays, host, may_alias=False)
  back = move(there, sharding)

  for value, array, far, near in zip(
    values(3), arrays, there, back, strict=True
  ):
    assert far.sharding == host
    assert far.sharding.memory_kind == "pinned_host"
    assert near.sharding.is_equivalent_to(array.sharding, 2)
    assert near.sharding.memory_kind == array.sharding.memory_kind
    for shard in far.addressable_shards:
      assert shard.data.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(near, value)


@pytest.mark.parametrize("move", [transfer, transfer_shards])
def test_each_copy_of_an_array_has_memory_of_its_own(sharding, move):
  host = sharding.with_memory_kind("pinned_host")
  (array,) = place(values(1), sharding)

  copies = move([array, array], host, may_alias=False)

  pointers = {
    shard.data.unsafe_buffer_pointer()
    for copy in copies
    for shard in copy.addressable_shards
  }
  assert len(pointers) == 2 * len(jax.devices()[:4])


def test_one_array_is_a_tree(sharding):
  (value,) = values(1)
  array = transfer_shards(place(value, sharding), sharding)
  np.testing.assert_array_equal(array, value)
