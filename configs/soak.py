"""Requests of all lengths for an hour: does anything grow, leak or go wrong?

Instances are small, so that requests borrow, are preempted, swapped to host
memory and recomputed all the time; some are aborted. Every answer is checked.
The exit status is 1 if one is wrong, a program is compiled after the warm-up,
an rBlock is leaked, in HBM or in host memory, or memory grows by more than
`max_growth_mib`. Of several processes memory is that of process 0.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import quickstart


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  config.experiment = "soak"  # experiments/soak.py
  del config.document
  del config.short_requests
  config.duration_s = 3600.0
  config.sample_every_s = 15.0
  # Between the second fifth of the time and the last one, in resident memory.
  config.max_growth_mib = 32.0

  config.requests = ConfigDict()
  config.requests.num_in_flight = 12
  # Lengths are drawn evenly on a logarithmic scale.
  config.requests.min_tokens = 48
  config.requests.max_tokens = 2000
  config.requests.max_more_tokens = 256  # Decoded after the answer.
  config.requests.aborted = 0.1  # Part of them that is aborted at some moment.

  # Each instance holds 1,024 tokens, and has room for as many in host memory.
  config.cache.block_size = 32
  config.cache.num_blocks = 33
  config.cache.host_blocks = 33
  # As slow as these computations are, a copy always pays.
  config.cache.recompute_tokens_per_s = 1e3
  config.lending.headroom_blocks = placeholder(int)
  config.lending.spill_slots = 4
  config.lending.group_prefill_buckets = (128,)
  config.scheduler.prefill_buckets = (128,)
  return config
