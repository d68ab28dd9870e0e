"""Answers to a file of requests, with a journal to go on from after a crash.

`config.requests.path` names a file of JSON lines, a request each: `prompt`, a
text or token ids, and perhaps `request_id` and fields of `SamplingParams`. The
answers come to `outputs.jsonl` in the workdir, in the same order. The fields of
`cache`, `lending` and `scheduler` are those of `infinite_llm/config.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import quickstart


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  config.experiment = "batch"  # experiments/batch.py
  del config.document
  del config.short_requests
  # Folder of a checkpoint; none builds the needle checkpoint in the workdir.
  config.model.path = placeholder(str)
  config.model.dtype = "auto"
  config.requests = ConfigDict()
  config.requests.path = placeholder(str)
  config.requests.num_in_flight = 64  # More wait until one ends.
  config.lending.headroom_blocks = placeholder(int)
  config.lending.spill_slots = 4
  config.lending.group_prefill_buckets = (128, 1024)
  config.scheduler.max_num_seqs = 16
  config.scheduler.decode_buckets = (4, 16)
  config.scheduler.prefill_buckets = (128, 1024)
  config.scheduler.prefill_rows = 4
  return config
