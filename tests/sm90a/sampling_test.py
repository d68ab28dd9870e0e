"""Sampling programs compile for Hopper, and no device decides what they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.cache.packed_rows import pack
from infinite_llm.engine.sampler import build_sample
from infinite_llm.engine.sampling import SamplingKind, sampling_arrays

# Of Llama-3; the largest decode bucket that is usual.
VOCAB_SIZE, ROWS, MAX_NUM_SEQS = 128256, 64, 64


def _array(shape, dtype):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("kind", SamplingKind)
def test_sampling_is_launched_without_waiting(sm90a, kind):
  given = pack((sampling_arrays([], ROWS), np.zeros(ROWS, np.int32)))
  compiled, _ = sm90a.compile(
    build_sample(kind, max_logprobs=5),
    _array((ROWS, VOCAB_SIZE), jnp.float32),
    _array((ROWS,), bool),
    jax.tree.map(lambda x: _array(x.shape, x.dtype), given),
    _array((MAX_NUM_SEQS, VOCAB_SIZE), bool),
    _array((MAX_NUM_SEQS,), jnp.int32),
    donate_argnums=(3, 4),
  )
  # `Sm90a.compile` finds no branch, and no loop that a device ends.
  assert (" sort(" in compiled.as_text()) == (kind is SamplingKind.CUT)
