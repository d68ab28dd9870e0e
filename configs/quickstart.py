"""One request whose context fits in no instance, on CPU devices.

Every field is a flag of the runner: `--config.document.num_tokens=131072`. The
fields of `cache`, `lending` and `scheduler` are those of the dataclasses in
`infinite_llm/config.py` and `lending_config.py`, which say what they mean.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.experiment = "quickstart"  # experiments/quickstart.py
  config.seed = 0  # Draws the pass keys, their names and the short prompts.
  config.show_progress = True

  config.model = ConfigDict()
  # Folder of the needle checkpoint, built if need be; none is in the workdir.
  config.model.path = placeholder(str)
  config.model.dtype = "float32"

  config.document = ConfigDict()
  # UTF-8 text, repeated or cut to length; none is CPython's topic texts.
  config.document.path = placeholder(str)
  config.document.num_tokens = 65536
  config.document.num_needles = 4  # Pass keys hidden in it.
  # Where they begin, as fractions of the document; empty spreads them evenly.
  config.document.depths = ()

  config.short_requests = ConfigDict()
  # At once on every instance but that of the long request, all the time.
  config.short_requests.num_in_flight = 1
  config.short_requests.num_tokens = 256

  config.cluster = ConfigDict()
  config.cluster.platform = "cpu"  # Or "gpu".
  config.cluster.num_instances = 4
  config.cluster.tensor_parallel = 1

  config.cache = ConfigDict()
  config.cache.block_size = 64
  # None gives all instances together a third more than the document needs: with
  # four, each has room for about a third of it.
  config.cache.num_blocks = placeholder(int)
  config.cache.kv_dtype = placeholder(str)
  config.cache.kv_scales = placeholder(str)  # A .npy file, for float8_e4m3fn.
  # Never used: this job's pools follow from its document, not from memory.
  config.cache.memory_fraction = 0.92
  config.cache.host_blocks = 0
  config.cache.host_link_bytes_per_s = 40e9
  config.cache.recompute_tokens_per_s = 40e3
  config.cache.verify_moves = False
  config.cache.host_attention = False
  config.cache.host_attention_share = 0.5

  config.lending = ConfigDict()
  config.lending.policy = "borrow"
  config.lending.performance_profile = placeholder(str)  # For "greedy".
  config.lending.spill_slots = 2
  config.lending.max_lent_blocks = placeholder(int)
  config.lending.headroom_blocks = 16  # Kept for the short requests.
  # One size, so chunks never shrink: the long request is what is timed here.
  config.lending.group_prefill_buckets = (1024,)
  config.lending.group_chunk_s = 0.5
  config.lending.exchange_blocks = 16
  config.lending.resend_after_s = 0.5
  config.lending.heartbeat_every_s = 0.1
  config.lending.lease_s = 10.0
  config.lending.full_heartbeat_every = 10
  config.lending.expire_after_s = 5.0
  config.lending.leader_lease = 0.75
  config.lending.plan_every_s = 1.0
  config.lending.freeze_s = 1.0
  config.lending.link_domains = ()  # All instances are in one.
  config.lending.link_between_s = 1.0
  config.lending.debtor_batch = 32
  config.lending.creditor_use = 0.8
  config.lending.bound_remote_share = placeholder(bool)
  config.lending.min_gain = 0.0
  config.lending.max_moves = 1000
  config.lending.max_circles = 1000

  config.scheduler = ConfigDict()
  config.scheduler.max_num_seqs = 4
  config.scheduler.decode_buckets = (4,)
  config.scheduler.prefill_buckets = (1024,)
  config.scheduler.prefill_rows = 2
  config.scheduler.async_scheduling = True
  config.scheduler.max_row_attempts = 6
  return config
