"""fetch_words gives what lies in host memory, and in the device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels.fetch_words import mosaic_gpu
from pallas_kernels.fetch_words.api import fetch_words
from pallas_kernels.interpreted import settled


def _interpreted(words):
  params = plgpu.InterpretGPUParams(detect_races=True)
  return settled(mosaic_gpu.fetch(words, interpret=params), params)


_each = pytest.mark.parametrize(
  "call",
  [
    pytest.param(
      functools.partial(fetch_words, implementation="xla"), id="xla"
    ),
    pytest.param(_interpreted, id="mosaic_gpu_interpreted"),
    pytest.param(
      functools.partial(fetch_words, implementation="mosaic_gpu"),
      id="mosaic_gpu",
      marks=pytest.mark.gpu,
    ),
  ],
)


def _words(*shape: int) -> np.ndarray:
  bits = np.random.default_rng(0).integers(-(2**31), 2**31, shape)
  return bits.astype(np.int32)


@_each
@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (1, 0), (2, 8192)])
def test_all_words_come_in_order(call, shape):
  words = _words(*shape)
  fetched = call(jnp.asarray(words))
  assert fetched.dtype == jnp.int32
  np.testing.assert_array_equal(fetched, words)


@pytest.mark.parametrize(
  "implementation", ["xla", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
def test_programs_compute_with_words_of_host_memory(implementation):
  pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  words = _words(2, 256)

  @jax.jit
  def double(words):
    return 2 * fetch_words(words, implementation=implementation)

  for i in range(3):
    doubled = double(jax.device_put(words + i, pinned))
    np.testing.assert_array_equal(doubled, 2 * (words + i))
    assert doubled.sharding.memory_kind == "device"


def test_rows_that_threads_do_not_share_evenly_are_not_covered():
  with pytest.raises(NotImplementedError, match=r"multiples of 128 .* got 100"):
    _interpreted(jnp.zeros((1, 100), jnp.int32))


@pytest.mark.parametrize(
  ("words", "rule"),
  [
    (jnp.zeros(128, jnp.int32), r"words must be \[M, W\]; got \[128\]"),
    (jnp.zeros((1, 128)), "words must be int32; got float32"),
  ],
)
def test_what_are_no_words_is_refused(words, rule):
  with pytest.raises(ValueError, match=rule):
    fetch_words(words)
