"""The config of `no_spill_cost` in a size for tests."""

from ml_collections import ConfigDict

from configs.no_spill_cost import get_config


def small_config() -> ConfigDict:
  """Two instances of a tiny model, on the CPU."""
  config = get_config()
  config.cluster.platform = "cpu"
  config.cluster.num_instances = 2
  config.repeats = 1
  config.model.vocab_size = 64
  config.model.model_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 1
  config.model.num_q_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 16
  config.model.dtype = "float32"
  config.cache.block_size = 16
  config.cache.num_blocks = 33
  config.lending.headroom_blocks = 2
  config.lending.group_prefill_buckets = (32,)
  config.scheduler.max_num_seqs = 4
  config.scheduler.decode_buckets = (4,)
  config.scheduler.prefill_buckets = (64,)
  config.scheduler.prefill_rows = 4
  config.prefill.prompt_tokens = 128
  config.prefill.warm_steps = 1
  config.prefill.steps = 4
  config.decode.num_in_flight = 4
  config.decode.prompt_tokens = 16
  config.decode.max_tokens = 24
  config.decode.warm_steps = 4
  config.decode.steps = 12
  config.long.prompt_tokens = 700
  config.long.max_tokens = 60
  return config
