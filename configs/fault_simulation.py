"""Simulated clusters under faults, one for each seed; any violation fails.

The exit status is 1 if anything happened that must never happen. The failing
seed is printed with the command that replays it, with a trace to read:

    python -m experiments.run --config=configs/fault_simulation.py
      --config.seed=17

A longer run: one cluster of 64 instances and a million messages, with every
kind of fault at once.

    python -m experiments.run --config=configs/fault_simulation.py
      --config.num_seeds=1 --config.num_instances=64
      --config.min_messages=1000000
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "fault_simulation"  # experiments/fault_simulation.py
  config.first_seed = 0
  config.num_seeds = 1000
  # A seed to replay, alone and with its trace; -1 runs them all.
  config.seed = -1
  # Instances of each cluster, with every kind of fault at once; 0 has the seed
  # decide what each is like.
  config.num_instances = 0
  # Each seed goes on until so much has happened.
  config.min_messages = 300
  config.min_faults = 5
  return config
