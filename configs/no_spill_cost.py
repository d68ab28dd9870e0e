"""What lending costs those who do not borrow, and what a spill costs the rest.

As it stands: an 8B Llama-3 shape in bfloat16 on four GPUs, one for each
instance, of 100 GB or more: separate and sharing engines take turns on them,
with 40 GB each. Instance 0 prefills prompts of 8K tokens all the time, the
others decode full batches.

    python -m experiments.run --config=configs/no_spill_cost.py
      --config.cluster.num_processes=4 --workdir=runs/no_spill_cost
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "no_spill_cost"  # experiments/no_spill_cost.py
  config.seed = 0
  # Those to run, in this order; "alone" is of one process only.
  config.cases = ("alone", "separate", "sharing", "spilling")
  # rows.json of an earlier run of other cases, for ratios to those; or empty.
  config.earlier_rows = ""
  config.repeats = 3  # Of each case without spills; the median is taken.

  config.cluster = ConfigDict()
  config.cluster.platform = "gpu"  # Or "cpu".
  config.cluster.num_instances = 4
  config.cluster.tensor_parallel = 1
  # 1 for all instances, or as many as instances. The experiment starts them.
  config.cluster.num_processes = 1
  config.cluster.patience_s = 900.0  # How long they wait for each other.

  config.model = ConfigDict()  # An 8B Llama-3, with random weights.
  config.model.vocab_size = 128256
  config.model.model_dim = 4096
  config.model.mlp_dim = 14336
  config.model.num_layers = 32
  config.model.num_q_heads = 32
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.dtype = "bfloat16"

  # Fields of `infinite_llm/config.py`, the same for all engines.
  config.cache = ConfigDict()
  config.cache.block_size = 64
  config.cache.num_blocks = 3073  # 24 GiB: 196,608 tokens.
  config.lending = ConfigDict()
  config.lending.policy = "borrow"
  config.lending.spill_slots = 4
  config.lending.headroom_blocks = 64
  # Small, since others wait for a chunk of the long prompt.
  config.lending.group_prefill_buckets = (256,)
  config.scheduler = ConfigDict()
  config.scheduler.max_num_seqs = 64
  config.scheduler.decode_buckets = (4, 64)
  # While rBlocks are lent, prompts go in chunks of the smaller size.
  config.scheduler.prefill_buckets = (1024, 8192)
  config.scheduler.prefill_rows = 8
  config.scheduler.async_scheduling = True

  # Steps are those that give tokens: of instance 0, one for each prompt.
  config.prefill = ConfigDict()
  config.prefill.num_in_flight = 2
  config.prefill.prompt_tokens = 8192
  config.prefill.max_tokens = 1
  config.prefill.warm_steps = 2
  config.prefill.steps = 20
  # All steps of the window must lie within `max_tokens`, and what the first
  # ones get before the batch is full.
  config.decode = ConfigDict()
  config.decode.num_in_flight = 64
  config.decode.prompt_tokens = 1024
  config.decode.max_tokens = 640
  config.decode.warm_steps = 40
  config.decode.steps = 320

  # The request that spills, where its prompt is more than an instance holds.
  config.long = ConfigDict()
  config.long.instance = 0
  config.long.prompt_tokens = 262144
  config.long.max_tokens = 512

  # What the experiment tells the processes that it starts; not for others.
  config.child = ConfigDict()
  config.child.part = ""  # "separate" or "sharing".
  config.child.instance = 0  # Whose engine a "separate" one has.
  config.child.folder = ""  # With what all of them share.
  return config
