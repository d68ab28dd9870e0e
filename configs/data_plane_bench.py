"""Times how rBlocks move, and attention over rBlocks that lie elsewhere.

As it stands: an 8B Llama-3 shape on all GPUs of one host, whether one, two or
four. HOST pools need XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to allow for them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "data_plane_bench"  # experiments/data_plane_bench.py
  config.seed = 0
  config.platform = "gpu"  # Or "cpu".
  config.num_devices = 0  # 0 takes all.
  config.repeats = 7  # Of which the median is taken.

  config.model = ConfigDict()  # An 8B Llama-3, with random weights.
  config.model.vocab_size = 128256
  config.model.model_dim = 4096
  config.model.mlp_dim = 14336
  config.model.num_layers = 32
  config.model.num_q_heads = 32
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.dtype = "bfloat16"
  config.model.block_size = 64

  # A decode step beside which rBlocks move.
  config.step = ConfigDict()
  config.step.rows = 64
  config.step.context = 4096
  config.step.steps = 60
  config.step.rounds = 15  # With and without what costs little beside it.

  config.tiers = ConfigDict()
  config.tiers.run = True
  config.tiers.blocks = (1, 4, 16, 64, 256, 512)

  # Links to host memory, of all devices at once.
  config.links = ConfigDict()
  config.links.run = True
  config.links.arrays = 16
  config.links.bytes = 2**26  # Of each.

  # Host memory read in place by a kernel, beside a transfer.
  config.host_reads = ConfigDict()
  config.host_reads.run = True
  config.host_reads.bytes = 2**30
  config.host_reads.programs = 528  # Of the kernel's grid.

  # An engine's request of which most lies in host memory.
  config.host_attention = ConfigDict()
  config.host_attention.run = True
  config.host_attention.kv_dtypes = ("bfloat16", "float8_e4m3fn")
  config.host_attention.num_blocks = 1025
  config.host_attention.host_blocks = 2049
  config.host_attention.prompt_tokens = 131072
  config.host_attention.chunk_tokens = 4096
  config.host_attention.max_tokens = 24

  config.exchange = ConfigDict()
  config.exchange.run = True
  config.exchange.blocks = (1, 4, 16, 64, 256)  # Per pair and program.

  # Small ones, by XLA and by a kernel of ours.
  config.collectives = ConfigDict()
  config.collectives.run = True
  config.collectives.bytes = (8192, 65536, 524288)  # That a device sends.
  config.collectives.calls = (8, 40)  # In one program; the slope is the time.

  config.attention = ConfigDict()
  config.attention.run = True
  config.attention.ways = ()  # Such as "dist"; none are all.
  config.attention.num_instances = (1, 2, 4)
  config.attention.contexts = (
    4096,
    16384,
    65536,
    262144,
    1048576,
    3670016,
  )
  # Distinct layers, so that no cache holds the KV, within this much a device.
  config.attention.layers = 16
  config.attention.most_bytes = 40e9
  config.attention.calls = (4, 36)  # In one program; the slope is the time.
  return config
