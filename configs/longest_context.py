"""Decodes one request at growing lengths, first in HBM, then in both tiers.

As it stands: an 8B Llama-3 shape, bf16, on four H200. A token has 128 KiB of
KV; before JAX starts, set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to what the longest
context has in host memory: 330 for 6M tokens in one process. Pools and weights
take 129 of 140 GiB, for which XLA_PYTHON_CLIENT_MEM_FRACTION must be 0.97.

Pinning so much takes one process minutes. With a process for each GPU they do
it side by side, and the limit is of each process: 86 for 6M tokens, 50 for 10M
in float8.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=86
      python -m experiments.launch.local --num_processes=4 --
      --config=configs/longest_context.py --workdir=runs/longest_context
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "longest_context"  # experiments/longest_context.py
  config.seed = 0

  config.cluster = ConfigDict()
  config.cluster.platform = "gpu"  # Or "cpu".
  config.cluster.num_instances = 4  # As many in each process.
  config.cluster.tensor_parallel = 1

  config.lengths = (262144, 1048576, 2097152, 3735552, 4718592, 6291456)
  config.steps = 5  # Of which the median is taken, after one to warm up.

  config.model = ConfigDict()  # An 8B Llama-3, with random weights.
  config.model.vocab_size = 128256
  config.model.model_dim = 4096
  config.model.mlp_dim = 14336
  config.model.num_layers = 32
  config.model.num_q_heads = 32
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.dtype = "bfloat16"

  config.cache = ConfigDict()
  config.cache.block_size = 64
  config.cache.kv_dtype = "bfloat16"  # Or "float8_e4m3fn".
  # rBlocks of each instance in HBM: 114 GiB beside 15 GiB of weights.
  config.cache.num_blocks = 14600
  config.cache.slab_blocks = 256  # Of each instance, in one transfer a layer.
  config.cache.most_staged = 6  # Such transfers in HBM at once.
  return config
