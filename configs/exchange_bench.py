"""Times rBlocks that go from instance to instance, beside decode steps too.

As it stands: an 8B Llama-3 shape on two GPUs, in one process; with
`experiments.launch.local --num_processes=2` in a process for each.
"""

from ml_collections import ConfigDict

from configs import data_plane_bench


def get_config() -> ConfigDict:
  whole = data_plane_bench.get_config()
  config = ConfigDict()
  config.experiment = "exchange_bench"  # experiments/exchange_bench.py
  config.seed = whole.seed
  config.repeats = whole.repeats

  config.cluster = ConfigDict()
  config.cluster.platform = "gpu"  # Or "cpu".
  config.cluster.num_instances = 2  # Each on one device.
  config.cluster.tensor_parallel = 1

  config.model = whole.model
  config.step = whole.step
  config.exchange = ConfigDict()
  config.exchange.blocks = whole.exchange.blocks
  return config
