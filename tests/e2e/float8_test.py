"""Keys and values in float8 give the tokens of a model that rounds them alike.

The oracle is dense: it divides keys and values by their scales, rounds them to
e4m3 and multiplies them again.
"""

import functools

import numpy as np
import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.calibration import calibrate_kv_scales
from infinite_llm.engine.engine import Engine
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.e2e.moves_test import Mover
from tests.e2e.rig import WORKLOAD, answers_of, new_rig
from tests.testing import GOLDEN, GreedyOracle, drain, pools_are_empty
from tests.tolerances import tolerance

KV_DTYPE = "float8_e4m3fn"
MAX_TOKENS = 256
NUM_BLOCKS = {1: 18, 2: 10, 4: 7}
LENGTHS = ([223, 40], [16, 17, 130], [1, 190], [112, 97])


def load(num_instances: int):
  return load_hf(
    GOLDEN / "llama3", make_mesh(num_instances, 1), dtype="float32"
  )


@functools.cache
def scales() -> np.ndarray:
  rng = np.random.default_rng(7)
  prompts = [rng.integers(3, 256, n).tolist() for n in (50, 200)]
  return calibrate_kv_scales(load(1), prompts)


@functools.cache
def oracle(kv_dtype: str | None, kv_scales_are_given: bool) -> GreedyOracle:
  given = scales() if kv_scales_are_given else None
  return GreedyOracle(load(1).dense(), MAX_TOKENS, kv_dtype, given)


def build(num_instances: int, **options) -> Engine:
  return Engine(
    load(num_instances),
    engine_config(
      num_instances=num_instances,
      block_size=16,
      num_blocks=NUM_BLOCKS[num_instances],
      kv_dtype=KV_DTYPE,
      dtype="float32",
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
      **options,
    ),
  )


def differences(engine: Engine, compared: GreedyOracle) -> list[str | None]:
  """What differs first in each answer of a workload."""
  rng = np.random.default_rng(engine.config.num_instances)
  found = []
  for lengths in LENGTHS:
    prompts = {}
    for n, length in enumerate(lengths):
      prompt = rng.integers(3, 256, length).tolist()
      sampling = SamplingParams(max_tokens=12, ignore_eos=True)
      name = engine.add_request(
        prompt, sampling, instance=n % engine.config.num_instances
      )
      prompts[name] = prompt
    outputs = drain(engine)
    assert pools_are_empty(engine)
    for name, prompt in prompts.items():
      output = outputs[name]
      assert output.finish_reason == "length", output.error
      found.append(
        compared.first_difference(
          prompt,
          list(output.token_ids),
          tolerance("float32", KV_DTYPE).greedy_tie,
        )
      )
  return found


@pytest.mark.parametrize(
  "num_instances",
  [
    pytest.param(1, marks=pytest.mark.slow),
    2,
    pytest.param(4, marks=pytest.mark.slow),
  ],
)
def test_greedy_output_is_that_of_a_dense_model_that_rounds_alike(
  num_instances,
):
  engine = build(num_instances, kv_scales=scales())
  assert not any(differences(engine, oracle(KV_DTYPE, True)))
  # It is the scales and the rounding that are looked at.
  assert sum(map(bool, differences(engine, oracle(None, False)))) >= 5
  assert sum(map(bool, differences(engine, oracle(KV_DTYPE, False)))) >= 5
  if num_instances > 1:
    assert engine.group.num_blocks_moved > 0
    assert engine.runner.launches["group_decode"] > 0
    assert engine.runner.launches["group_prefill"] > 0


def test_without_scales_they_are_one():
  engine = build(1)
  assert not any(differences(engine, oracle(KV_DTYPE, False)))


def test_scales_that_are_far_too_small_saturate_and_never_overflow():
  small = np.full(scales().shape, 1e-6, np.float32)
  engine = build(1, kv_scales=small)
  compared = GreedyOracle(load(1).dense(), MAX_TOKENS, KV_DTYPE, small)
  assert not any(differences(engine, compared))
  kv = np.asarray(engine.runner.pool.row(0).kv)
  assert not (kv & 0x7F == 0x7F).any()  # That would be NaN.
  assert (kv & 0x7F == 0x7E).any()  # 448.


def test_moves_in_both_directions_at_every_step(monkeypatch):
  rig = new_rig(kv_dtype=KV_DTYPE, kv_scales=scales())
  with rig.watch(monkeypatch):
    answers = answers_of(rig, KV_DTYPE, scales())
    rig.expected = answers
    num_moved = rig.engine.group.num_blocks_moved
    mover = Mover(rig, WORKLOAD)
    rig.add(WORKLOAD)
    outputs = rig.drain(mover)
    assert {name: outputs[name].token_ids for name in WORKLOAD} == answers
    assert rig.engine.group.num_blocks_moved - num_moved >= 4
    assert {kind for kind, _ in mover.plans} == {"MoveKvcache", "RecallKvcache"}
    assert not rig.failed_rows
    rig.finish()


def test_host_memory_gives_back_what_it_took():
  engine = build(
    1,
    kv_scales=scales(),
    policy="swap",
    host_blocks=30,
    verify_moves=True,
    recompute_tokens_per_s=1.0,
  )
  rng = np.random.default_rng(3)
  prompts = {}
  for length in (120, 100, 110):
    prompt = rng.integers(3, 256, length).tolist()
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts[engine.add_request(prompt, sampling)] = prompt
  outputs = drain(engine)
  assert pools_are_empty(engine)
  (host,) = engine.group.host_tiers.pools
  assert all(host.num_moved.values())
  assert host.read(1)[0].dtype == np.uint8
  for name, prompt in prompts.items():
    difference = oracle(KV_DTYPE, True).first_difference(
      prompt,
      list(outputs[name].token_ids),
      tolerance("float32", KV_DTYPE).greedy_tie,
    )
    assert difference is None, difference
