"""Decoding over both tiers gives the dense model's logits."""

import numpy as np
import pytest

from experiments.layered_decode import LayeredDecode
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import ConfigError
from infinite_llm.models.hf_loader import load_hf
from tests.testing import GOLDEN, dense_logits
from tests.tolerances import tolerance

pytestmark = pytest.mark.bench

P = 8
S = 2


def tokens_of(count):
  return np.random.default_rng(0).integers(3, 256, count).tolist()


@pytest.mark.parametrize(("num_instances", "ranks"), [(1, 1), (2, 2)])
def test_logits_are_those_of_the_dense_model(num_instances, ranks):
  model = load_hf(
    GOLDEN / "llama3", make_mesh(num_instances, ranks), dtype="float32"
  )
  decode = LayeredDecode(
    model,
    block_size=P,
    num_blocks=5,
    slab_blocks=S,
    kv_dtype="float32",
  )
  tokens = tokens_of(9 * P)
  logits = []
  free = [[1, 2, 3, 4] for _ in range(num_instances)]
  for position, token in enumerate(tokens):
    if position % P == 0:
      # Instances take turns, and what is old goes to host memory.
      logical = position // P
      owner = logical % num_instances
      if not free[owner]:
        gone = [min(len(mine) - 1, S) for mine in decode.in_hbm]
        for mine, count, ids in zip(decode.in_hbm, gone, free, strict=True):
          ids += [block for block, _ in mine[:count]]
        decode.spill(gone)
      held = decode.in_hbm
      held[owner].append((free[owner].pop(), logical))
      decode.in_hbm = held
    logits.append(np.asarray(decode.step(token, position))[0])
  assert len(decode.slabs) >= (3 if num_instances == 1 else 1)
  dense = load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype="float32").dense()
  expected = dense_logits(dense, tokens)
  error = np.abs(np.stack(logits) - np.asarray(expected)).max()
  assert error < tolerance("float32").logits


def test_sliding_windows_are_refused():
  model = load_hf(GOLDEN / "mistral_window", make_mesh(1, 1), dtype="float32")
  with pytest.raises(ConfigError, match=r"sliding_window must be None; got"):
    LayeredDecode(
      model, block_size=P, num_blocks=5, slab_blocks=S, kv_dtype="float32"
    )
