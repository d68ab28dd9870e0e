import json
import pathlib
import statistics

import pytest

from infinite_llm.errors import ConfigError
from infinite_llm.simulator.cost_model import Work, load_cost_model
from tests.simulator.simulated_clusters import make_cost

_ANCHORS = pathlib.Path("experiments/anchors")
_COSTS = _ANCHORS / "h200_llama3_8b_costs.json"


def test_a_step_adds_up_its_programs():
  # Two rows that attend 30 tokens, a prompt of 4 with 100 pairs, a copy.
  work = Work(
    rows=2, tokens=30, prefill_tokens=4, prefill_pairs=100, copied_s=1.0
  )

  assert make_cost(step_overhead_s=7.0).step_s(work) == pytest.approx(
    0.2 + 0.3 + 0.4 + 0.1 + 1.0 + 7.0
  )


def test_nothing_to_do_takes_no_time():
  assert make_cost(step_overhead_s=7.0).step_s(Work()) == 0.0


def test_a_group_step_takes_the_slowest_and_its_exchanges():
  works = [Work(rows=1, tokens=10), Work(rows=1, tokens=30)]
  cost = make_cost()

  decode_s = cost.group_step_s(works, has_decode=True, query_tokens=0)
  both_s = cost.group_step_s(works, has_decode=True, query_tokens=20)

  assert decode_s == pytest.approx(0.1 + 0.3 + 0.5)
  assert both_s == pytest.approx(0.1 + 0.3 + 2 * 0.5 + 20 / 1000)


def test_copies_take_their_bytes_over_their_speed():
  cost = make_cost(kv_bytes_per_token=10, host_bytes_per_s=100)

  assert cost.move_s(8) == pytest.approx(0.08)
  assert cost.swap_s(8) == pytest.approx(0.8)


def test_a_prompt_is_computed_at_the_speed_of_a_chunk():
  cost = make_cost(step_overhead_s=1.0)

  # 4 tokens and 10 pairs in 0.4 + 0.01 + 1.0 seconds.
  assert cost.prefill_tokens_per_s(4) == pytest.approx(4 / 1.41)


def test_devices_of_an_instance_share_its_work_and_add_up():
  work = Work(rows=2, tokens=30, prefill_tokens=4, prefill_pairs=100)
  cost = make_cost(reduce_s=0.25, reduce_bytes_per_token=10).sharded(4)

  # A quarter of the work; for both programs two all-reduces, in which each
  # device sends 1.5 times 10 bytes for each of 6 tokens at 1000 bytes/s.
  assert cost.step_s(work) == pytest.approx(
    (0.2 + 0.3 + 0.4 + 0.1) / 4 + 2 * (2 * 0.25 + 6 * 0.015)
  )
  assert cost.move_s(8) == pytest.approx(0.008 / 4)
  assert cost.swap_s(8) == pytest.approx(0.008 / 4)
  assert make_cost(reduce_s=0.25).sharded(1) == make_cost(reduce_s=0.25)


@pytest.mark.parametrize("devices", [0, 2])
def test_devices_are_shared_out_once(devices):
  with pytest.raises(ConfigError, match=f"tensor_parallel .* got {devices}"):
    make_cost().sharded(2).sharded(devices)


def test_the_default_is_what_was_measured():
  cost = load_cost_model(_COSTS)
  anchors = json.loads((_ANCHORS / "h200_2026-11-21.json").read_text())
  rows = json.loads(
    pathlib.Path("experiments/results/kernel_bench/h200.json").read_text()
  )

  prefill = [
    row["tflop_per_s"] * 1e12 / (4 * 32 * 128)
    for row in rows
    if row["implementation"] == "mosaic_gpu_prefill"
    and row["kernel"] == "prefill"
    and row["case"].endswith("P 64")
  ]
  # Machines of the kind differ by as much.
  assert cost.prefill_pairs_per_s == pytest.approx(
    statistics.median(prefill), rel=0.05
  )
  ceilings = anchors["ceilings"]
  assert cost.link_bytes_per_s == ceilings["nvlink_device_put_GB_per_s"] * 1e9
  assert cost.host_bytes_per_s == ceilings["pinned_host_GB_per_s"] * 1e9


def test_the_default_is_near_the_steps_that_an_engine_took():
  cost = load_cost_model(_COSTS)
  anchors = json.loads((_ANCHORS / "h200_2026-11-21.json").read_text())

  for row in anchors["engine_vllm_0_24_llama31_8b_shape"]:
    context = row["prompt"] + row["output"] / 2
    work = Work(rows=row["requests"], tokens=row["requests"] * context)
    assert cost.step_s(work) * 1e3 == pytest.approx(row["step_ms"], rel=0.15)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("prefill_pairs_per_s", 0.0),
    ("link_bytes_per_s", float("nan")),
    ("step_overhead_s", -1.0),
  ],
)
def test_impossible_costs_are_refused(name, value):
  with pytest.raises(ConfigError, match=name):
    make_cost(**{name: value})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"performance": "x.json"}'])
def test_what_is_no_cost_model_is_refused(tmp_path, text):
  path = tmp_path / "costs.json"
  path.write_text(text)

  with pytest.raises(ConfigError, match="path must name"):
    load_cost_model(path)
