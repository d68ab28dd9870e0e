"""Small clusters to simulate, with times that can be worked out by hand."""

from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.scheduler.performance_model import PerformanceModel, Profile
from infinite_llm.simulator.cluster_config import ClusterConfig
from infinite_llm.simulator.cluster_simulator import ClusterSimulator
from infinite_llm.simulator.cost_model import CostModel
from infinite_llm.simulator.traces import TraceRequest

BLOCK_SIZE = 8


def make_cost(**changes) -> CostModel:
  """One layer: 0.1 s a row, 0.01 s an attended token, 0.001 s a pair."""
  values = {
    "performance": PerformanceModel(
      num_layers=1,
      work_per_token=1.0,
      batch_speed=Profile(at=(1,), per_s=(10,)),
      attention_speed=Profile(at=(1,), per_s=(100,)),
      exchange_s=0.5,
    ),
    "prefill_pairs_per_s": 1000.0,
    "kv_bytes_per_token": 1.0,
    "query_bytes_per_token": 1.0,
    "link_bytes_per_s": 1000.0,
    "host_bytes_per_s": 1000.0,
  }
  return CostModel(**(values | changes))


def make_request(prompt_tokens, output_tokens, arrival_s=0.0) -> TraceRequest:
  return TraceRequest(
    arrival_s=arrival_s,
    prompt_tokens=prompt_tokens,
    output_tokens=output_tokens,
  )


def make_simulator(
  requests,
  *,
  policy="borrow",
  num_instances=2,
  num_blocks=5,
  cost=None,
  chunk_tokens=16,
  host_blocks=13,
  **options,
) -> ClusterSimulator:
  """Two instances of 4 rBlocks of 8 tokens, if nothing else is said."""
  config = ClusterConfig(
    num_instances=num_instances,
    num_blocks=num_blocks,
    block_size=BLOCK_SIZE,
    host_blocks=host_blocks,
    lending=LendingConfig(
      policy=policy, group_prefill_buckets=(8, 16), headroom_blocks=0
    ),
    scheduler=SchedulerConfig(
      max_num_seqs=8, decode_buckets=(8,), prefill_buckets=(chunk_tokens,)
    ),
    **options,
  )
  return ClusterSimulator(config, cost or make_cost(), requests)
