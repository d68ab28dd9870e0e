"""Compares policies on simulated clusters of H200, on one CPU: no devices.

Every field is a flag of the runner: `--config.trace.seed=1`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "cluster_simulation"
  config.seed = 0  # Draws the delays of messages.
  config.costs = "experiments/anchors/h200_llama3_8b_costs.json"
  # Any of borrow, greedy, static, swap, migrate. "-on-8" makes of the same
  # devices instances of 8 each, "-without-dgfm" leaves circles of debts be.
  config.policies = (
    "borrow",
    "borrow-without-dgfm",
    "greedy",
    "greedy-without-dgfm",
    "static",
    "static-on-8",
    "swap",
    "migrate",
  )

  config.cluster = ConfigDict()
  config.cluster.num_instances = 32
  # 131,072 tokens: about what an A100 of 80 GB holds of a 7B model with as many
  # KV heads as query heads, as in the paper. An H200 has room for 7 times as
  # many tokens of this model, and sharing little to do. Books of large rBlocks
  # cost less CPU time.
  config.cluster.block_size = 256
  config.cluster.num_blocks = 513
  config.cluster.host_blocks = 7813  # 2M tokens, of preempted requests.
  config.cluster.most_s = 7200.0

  config.lending = ConfigDict()
  config.lending.spill_slots = 8
  config.lending.headroom_blocks = 64
  config.lending.heartbeat_every_s = 0.25
  config.lending.max_moves = 1000  # Of a plan of greedy or migrate.
  config.lending.bound_remote_share = placeholder(bool)
  config.lending.min_gain = 0.0  # Of each move, as a share of throughput.

  config.scheduler = ConfigDict()
  config.scheduler.max_num_seqs = 256
  # A program of a group step's size, for prompts that others wait for.
  config.scheduler.prefill_buckets = (1024, 8192)

  config.trace = ConfigDict()
  config.trace.path = ""  # A .csv or .json file, in place of drawn traces.
  config.trace.seed = 0
  # A trace for each range of context lengths, all equally likely by logarithm.
  config.trace.min_tokens = (1000, 1000, 1000)
  config.trace.max_tokens = (60_000, 200_000, 2_000_000)
  # What arrives is the same for all: about so many tokens a second, so long.
  config.trace.tokens_per_s = 450_000.0
  config.trace.arrive_s = 20.0
  config.trace.min_output_tokens = 128
  config.trace.max_output_tokens = 1024

  # One more run, of many instances.
  config.large = ConfigDict()
  config.large.num_instances = 1000  # 0 leaves it out.
  config.large.policy = "borrow"
  config.large.min_tokens = 1000
  config.large.max_tokens = 200_000
  config.large.tokens_per_s = 9_000_000.0
  config.large.arrive_s = 3.0
  config.large.heartbeat_every_s = 1.0
  return config
