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

  # The cases of `pallas_kernels/micro_attention/cases.py`, as the tests'.
  config.conformance = ConfigDict()
  config.conformance.run = True
  config.conformance.part = (0, 1)  # Which, and of how many equal parts.

  config.decode = ConfigDict()
  config.decode.run = True
  config.decode.block_size = 64
  config.decode.dtype = "bfloat16"
  # Contexts of the plot: as many rows as fill about 4 GB of KV.
  config.decode.sweep = (1024, 4096, 16384, 65536, 262144, 1048576)
  config.decode.sweep_tokens = 1048576
  # Other cases: how many rows of which context, heads, and options.
  config.decode.more = (
    "1x524288+63x8192 32/8",
    "1x1048576 32/8 kv=float8_e4m3fn",
    "32x32768 32/8 kv=float8_e4m3fn",
    "256x4096 32/8 kv=float8_e4m3fn",
    "32x8192 32/32 kv=float8_e4m3fn",
    "64x2048 32/8 kv=float8_e4m3fn",
    "1x524288+63x8192 32/8 kv=float8_e4m3fn",
    "32x32768 32/8 window=4096",
    "32x32768 32/8 queries=4",
    "32x32768 32/8 queries=8",
    # Groups in parts, each of which reads KV; one is filled up.
    "32x32768 64/1",
    "32x32768 71/1",
    # One KV head, of which each multiprocessor has a row; and parts to merge.
    "132x16384 8/1",
    "1x2162688 8/1",
    "64x0 32/8",  # What a creditor pays that holds nothing.
    "1x64 32/8",
  )
  config.decode.peers = True  # Time FlashInfer and the in-tree kernel too.

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

  # What the table in `mosaic_gpu.py` is made of; long.
  config.choice = ConfigDict()
  config.choice.run = False
  config.choice.kv_dtypes = ("bfloat16", "float8_e4m3fn")
  config.choice.query_tokens = (1, 2, 4, 8)
  # Rows and context.
  config.choice.shapes = (
    (1, 1024),
    (1, 16384),
    (1, 262144),
    (16, 1024),
    (16, 16384),
    (128, 1024),
    (128, 8192),
  )

  config.timing = ConfigDict()
  config.timing.calls = (4, 20)  # In one program; the slope is the time.
  config.timing.repeats = 9  # Of which the median is taken.
  return config
