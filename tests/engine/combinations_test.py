"""Every family, dtype and mesh: greedy output of a context over two instances.

Each case compiles an engine of its own, so models are cut to few layers.
"""

import dataclasses

import numpy as np
import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.testing import (
  GreedyOracle,
  drain,
  pools_are_empty,
  write_shallow_checkpoint,
)
from tests.tolerances import tolerance

MAX_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One combination of model, mesh and dtypes."""

  family: str = "llama3"
  tensor_parallel: int = 1
  dtype: str = "float32"
  kv_dtype: str | None = None
  num_layers: int = 1
  num_kv_heads: int | None = None


CASES = {
  "tensor parallel, norms of queries and keys": Case(
    family="qwen3", tensor_parallel=2
  ),
  "more tensor ranks than KV heads, biases": Case(
    family="qwen2", tensor_parallel=2, num_kv_heads=1
  ),
  # All bfloat16, without tensor parallelism: tests/e2e/greedy_test.py.
  "tensor parallel, float32 KV of bfloat16 weights": Case(
    family="llama2", tensor_parallel=2, dtype="bfloat16", kv_dtype="float32"
  ),
  "bfloat16 KV of float32 weights": Case(kv_dtype="bfloat16"),
  "float8 KV, tensor parallel, norms": Case(
    family="qwen3", tensor_parallel=2, kv_dtype="float8_e4m3fn"
  ),
  "float8 KV, more tensor ranks than KV heads": Case(
    family="qwen2",
    tensor_parallel=2,
    num_kv_heads=1,
    kv_dtype="float8_e4m3fn",
  ),
  "float8 KV of bfloat16 weights, sliding window in some layers": Case(
    family="qwen2_window",
    num_layers=2,
    dtype="bfloat16",
    kv_dtype="float8_e4m3fn",
  ),
  "sliding window": Case(family="mistral_window"),
  "biases, sliding window in some layers": Case(
    family="qwen2_window", num_layers=2
  ),
}


# What the others combine in other ways; `make test-slow` runs these.
SLOW = (
  "more tensor ranks than KV heads, biases",
  "bfloat16 KV of float32 weights",
  "float8 KV, tensor parallel, norms",
  "float8 KV of bfloat16 weights, sliding window in some layers",
  "sliding window",
)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in CASES
  ],
)
def test_greedy_output_equals_the_dense_model(name, tmp_path):
  case = CASES[name]
  path = write_shallow_checkpoint(
    tmp_path, case.family, case.num_layers, case.num_kv_heads
  )
  model = load_hf(path, make_mesh(2, case.tensor_parallel), dtype=case.dtype)
  kv_scales = None
  if case.kv_dtype == "float8_e4m3fn":
    # All different, so that one head's is seen to be no other's.
    shape = (case.num_layers, 2, model.config.num_kv_heads)
    kv_scales = 0.01 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)
  engine = Engine(
    model,
    engine_config(
      num_instances=2,
      tensor_parallel=case.tensor_parallel,
      dtype=case.dtype,
      kv_dtype=case.kv_dtype,
      kv_scales=kv_scales,
      block_size=16,
      num_blocks=10,
      max_num_seqs=4,
      decode_buckets=(4,),
      prefill_buckets=(64,),
      headroom_blocks=0,
      group_prefill_buckets=(64,),
      prefill_rows=4,
      spill_slots=4,
      resend_after_s=0.01,
      heartbeat_every_s=0.005,
    ),
  )
  dense = load_hf(path, make_mesh(1, 1), dtype=case.dtype).dense()
  oracle = GreedyOracle(dense, MAX_TOKENS, case.kv_dtype, kv_scales)
  allowed = tolerance(case.dtype, case.kv_dtype)
  rng = np.random.default_rng(0)
  # One after another lets each borrow all that there is; together they compete.
  for lengths in ([236], [161], [208, 40, 17], [145, 150, 31]):
    names = {}
    for length in lengths:
      prompt = rng.integers(3, 256, length).tolist()
      sampling = SamplingParams(max_tokens=16, ignore_eos=True)
      names[engine.add_request(prompt, sampling, instance=0)] = prompt
    outputs = drain(engine)
    assert pools_are_empty(engine)
    for request, prompt in names.items():
      output = outputs[request]
      assert output.finish_reason == "length", output.error
      difference = oracle.first_difference(
        prompt, list(output.token_ids), allowed.greedy_tie
      )
      assert difference is None, difference
  launches = engine.runner.launches
  assert launches["group_prefill"] > 0
  assert launches["group_decode"] > 30
