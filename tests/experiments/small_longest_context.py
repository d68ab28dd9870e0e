"""The config of `longest_context` in a size for tests."""

from ml_collections import ConfigDict

from configs.longest_context import get_config


def small_config() -> ConfigDict:
  """Two instances of two devices on the CPU; the last length is too long."""
  config = get_config()
  config.cluster.platform = "cpu"
  config.cluster.num_instances = 2
  config.cluster.tensor_parallel = 2
  config.lengths = (32, 64, 160)
  config.steps = 1
  config.model.vocab_size = 64
  config.model.model_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 2
  config.model.num_q_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 16
  config.model.dtype = "float32"
  config.cache.kv_dtype = "float32"
  config.cache.block_size = 8
  config.cache.num_blocks = 5
  config.cache.slab_blocks = 4
  return config
