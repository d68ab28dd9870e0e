"""The engine's greedy output is the dense model's, wherever the rBlocks lie."""

import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.testing import GOLDEN, GreedyOracle, drain, pools_are_empty
from tests.tolerances import tolerance

MAX_TOKENS = 256
NUM_BLOCKS = {  # So small that most contexts spread over several instances.
  (1, 16): 18,
  (2, 16): 10,
  (4, 16): 7,
  (1, 64): 6,
  (2, 64): 4,
  (4, 64): 3,
}


@functools.cache
def engine_for(num_instances: int, block_size: int, dtype: str) -> Engine:
  """An engine with tiny pools; kept, since compiling costs seconds."""
  model = load_hf(GOLDEN / "llama3", make_mesh(num_instances, 1), dtype=dtype)
  return Engine(
    model,
    engine_config(
      num_instances=num_instances,
      block_size=block_size,
      num_blocks=NUM_BLOCKS[num_instances, block_size],
      dtype=dtype,
      max_num_seqs=4,
      decode_buckets=(4,),
      prefill_buckets=(32,),
      headroom_blocks=0,
      group_prefill_buckets=(32,),
      prefill_rows=2,
      spill_slots=2,
      exchange_blocks=2,
      resend_after_s=0.01,
      heartbeat_every_s=0.005,
    ),
  )


@functools.cache
def oracle_for(dtype: str) -> GreedyOracle:
  model = load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype=dtype)
  return GreedyOracle(model.dense(), MAX_TOKENS)


@st.composite
def workloads(draw, num_instances: int, block_size: int):
  """Some requests, at least one of which may need several instances."""
  capacity = engine_for(num_instances, block_size, "float32").capacity_tokens
  longest = min(capacity, MAX_TOKENS) - 16
  # Lengths at the edges of rBlocks leave an instance empty, or with a single
  # token.
  edges = st.integers(0, longest // block_size - 1).flatmap(
    lambda n: st.sampled_from(
      [max(1, n * block_size - 1), max(1, n * block_size), n * block_size + 1]
    )
  )
  requests = st.tuples(
    st.one_of(st.integers(1, longest), edges),
    st.integers(1, 12),
    st.integers(0, num_instances - 1),
  )
  return draw(st.lists(requests, min_size=1, max_size=4)), draw(
    st.integers(0, 2**32 - 1)
  )


def check_workload(engine, dtype, requests, seed):
  rng = np.random.default_rng(seed)
  prompts = {}
  for length, count, instance in requests:
    prompt = rng.integers(3, 256, length).tolist()
    name = engine.add_request(
      prompt,
      SamplingParams(max_tokens=count, ignore_eos=True),
      instance=instance,
    )
    prompts[name] = (prompt, count)
  outputs = drain(engine)
  assert pools_are_empty(engine)
  for name, (prompt, count) in prompts.items():
    output = outputs[name]
    assert output.finish_reason == "length", output.error
    assert len(output.token_ids) == count
    difference = oracle_for(dtype).first_difference(
      prompt, list(output.token_ids), tolerance(dtype).greedy_tie
    )
    assert difference is None, difference


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("num_instances", [1, 2, 4])
def test_greedy_output_equals_the_dense_model(num_instances, block_size):
  engine = engine_for(num_instances, block_size, "float32")

  @hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None
  )
  @hypothesis.given(workloads(num_instances, block_size))
  def check(workload):
    check_workload(engine, "float32", *workload)

  check()
  if num_instances > 1:
    assert engine.group.num_blocks_moved > 0
    assert engine.runner.launches["group_decode"] > 0
    assert engine.runner.launches["group_prefill"] > 0


def test_bfloat16_output_equals_the_dense_bfloat16_model():
  engine = engine_for(4, 16, "bfloat16")
  for seed, length in enumerate((17, 130, 225)):
    check_workload(engine, "bfloat16", [(length, 12, seed)], seed)
