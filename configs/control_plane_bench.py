"""Times the control plane alone, on one CPU core: no devices, no network.

Every field is a flag of the runner: `--config.repeats=30`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "control_plane_bench"
  config.seed = 0  # Draws the clusters.
  config.repeats = 15  # Of which the median and the best are told.

  config.cluster = ConfigDict()
  config.cluster.num_instances = (32, 100, 256, 512, 1000)
  config.cluster.num_blocks = 1_000_000  # Over all instances.
  config.cluster.block_size = 64
  config.cluster.requests = 48  # Short ones, on an instance without a long one.
  # Part of the instances whose pool one long request fills.
  config.cluster.debtors = 0.3
  # Debts of each instance that exist already, some of them in circles.
  config.cluster.debts = 2
  # Part of each pool that real requests hold when rManagers are timed.
  config.cluster.fill = 0.2

  config.performance = "experiments/anchors/h200_llama3_8b_profile.json"

  config.step = ConfigDict()
  config.step.rows = 256  # Requests that decode.
  config.step.waiting = 1000  # Requests behind them.
  config.step.prompt_tokens = 200  # Up to an rBlock more, where they differ.
  config.step.steps = 200
  return config
