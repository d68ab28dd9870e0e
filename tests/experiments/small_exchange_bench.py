"""The config of `exchange_bench` in a size for tests."""

from ml_collections import ConfigDict

from configs.exchange_bench import get_config


def small_config() -> ConfigDict:
  config = get_config()
  config.repeats = 1
  config.cluster.platform = "cpu"
  config.model.vocab_size = 64
  config.model.model_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 1
  config.model.num_q_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 16
  config.model.dtype = "float32"
  config.model.block_size = 8
  config.step.rows = 2
  config.step.context = 32
  config.step.steps = 3
  config.step.rounds = 2
  config.exchange.blocks = (1, 3)
  return config
