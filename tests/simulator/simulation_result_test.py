from infinite_llm.simulator.simulation_result import (
  RequestRecord,
  SimulationResult,
)
from tests.simulator.simulated_clusters import make_request


def _result(records, duration_s):
  return SimulationResult(
    records=records,
    duration_s=duration_s,
    instance_steps=1,
    num_messages=1,
    num_blocks_moved=1,
    num_blocks_recalled=0,
    num_blocks_swapped=0,
    num_migrated=0,
    num_preempted=0,
    num_stalls=0,
    remote_share=0.0,
    num_blocks_leaked=0,
  )


def test_figures_are_of_finished_requests():
  records = [
    RequestRecord(
      request=make_request(10, 5, arrival_s=1.0),
      first_token_s=2.0,
      finish_s=4.0,
    ),
    RequestRecord(
      request=make_request(20, 1), first_token_s=10.0, finish_s=10.0
    ),
    RequestRecord(request=make_request(90, 9), first_token_s=1.0),
    RequestRecord(request=make_request(99, 9), refused="too long"),
  ]

  summary = _result(records, 10.0).summary()

  assert summary["num_requests"] == 4
  assert summary["num_finished"] == 2
  assert summary["num_refused"] == 1
  assert summary["num_failed"] == 0
  assert summary["output_tokens_per_s"] == 0.6
  assert summary["served_tokens_per_s"] == 3.6
  assert summary["longest_context_tokens"] == 21
  assert summary["first_token_median_s"] == 5.5
  assert summary["latency_median_s"] == 6.5
  assert summary["latency_p99_s"] == 10.0
  assert summary["per_token_median_s"] == 0.5


def test_nothing_finished_is_no_latency():
  summary = _result([RequestRecord(request=make_request(9, 9))], 0.0).summary()

  assert summary["served_tokens_per_s"] == 0.0
  assert summary["longest_context_tokens"] == 0
  assert summary["latency_median_s"] is None
  assert summary["latency_p99_s"] is None
