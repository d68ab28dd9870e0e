import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from infinite_llm.cache.checksum import checksum


@pytest.mark.parametrize(
  "dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_device_and_host_agree(dtype):
  block = np.random.default_rng(0).normal(size=(3, 2, 8, 4)).astype(dtype)
  assert int(checksum(jnp.asarray(block))) == int(checksum(block))


def test_each_number_and_its_place_count():
  block = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  sums = {int(checksum(block))}
  for i in range(block.size):
    other = block.copy()
    other.reshape(-1).view(np.uint32)[i] ^= 1
    sums.add(int(checksum(other)))
  swapped = block[::-1].copy()
  sums.add(int(checksum(swapped)))
  assert len(sums) == block.size + 2


def test_it_is_the_sum_of_mixed_words():
  """By Python's own integers, so that it cannot drift with a library."""
  block = np.asarray([1.0, -2.0, 0.0], np.float32)
  total = 0
  for place, word in enumerate((0x3F800000, 0xC0000000, 0)):
    x = (word + place * 0x9E3779B9) % 2**32
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    total += x ^ x >> 16
  assert int(checksum(block)) == total % 2**32
