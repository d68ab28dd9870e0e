"""Times the attention kernels on one GPU beside their peers.

The cases are those of the anchors file, whose figures stand in for peers that
cannot be run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "kernel_bench"  # experiments/kernel_bench.py
  config.seed = 0
  config.anchors = "experiments/anchors/h200_2026-11-21.json"

  config.decode = ConfigDict()
  config.decode.run = True
  config.decode.block_size = 64
  config.decode.dtype = "bfloat16"
  # Cases beside those of the anchors: how many rows of which context.
  config.decode.mixes = ("1x524288+63x8192",)
  # Contexts of the plot: as many rows as fill about 4 GB of KV.
  config.decode.sweep = (1024, 4096, 16384, 65536, 262144, 1048576)
  config.decode.sweep_tokens = 1048576
  config.decode.peers = True  # Time the in-tree kernel too.

  config.prefill = ConfigDict()
  config.prefill.run = True
  config.prefill.block_sizes = (64, 16)
  # Beside the anchors' cases: query tokens, context and head dim.
  config.prefill.more = (
    (32768, 32768, 128),
    (2048, 32768, 64),
    (2048, 32768, 256),
  )
  config.prefill.peers = True  # Time JAX's own kernels too.

  config.copies = ConfigDict()
  config.copies.run = True
  config.copies.append_tokens = (8192, 65536)
  config.copies.blocks = (64, 256)  # Packed and unpacked, of 8 MiB each.

  config.timing = ConfigDict()
  config.timing.calls = (4, 20)  # In one program; the slope is the time.
  config.timing.repeats = 9  # Of which the median is taken.
  return config
