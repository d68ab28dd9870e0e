"""What counts as a run of a kernel."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from experiments import kernel_timing
from experiments.kernel_timing import busy_us, device_times, named_bytes
from pallas_kernels.micro_attention.api import BlockTables


def _process(pid, name):
  return {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}


def test_only_a_gpu_runs_kernels():
  events = [
    _process(1, "/device:GPU:0"),
    _process(2, "/host:CPU"),
    {"ph": "X", "pid": 1, "name": "decode_kernel", "dur": 3.0},
    {"ph": "X", "pid": 1, "name": "memset", "dur": 1.0},
    {"ph": "X", "pid": 2, "name": "decode_kernel", "dur": 0.5},
    {"ph": "X", "pid": 1, "name": "decode_kernel", "dur": 4.0},
  ]
  assert device_times(events, "decode") == [3.0, 4.0]


def _stream(pid, tid, name):
  about = {"pid": pid, "tid": tid, "args": {"name": name}}
  return {"ph": "M", "name": "thread_name", **about}


def test_all_kernels_of_all_streams_keep_a_device_busy(monkeypatch):
  events = [
    _stream(1, 7, "Stream #14(Compute)"),
    _stream(1, 8, "Stream #15(MemcpyH2D)"),
    _stream(2, 7, "python"),
    {"ph": "X", "pid": 1, "tid": 7, "name": "a", "dur": 3.0},
    {"ph": "X", "pid": 1, "tid": 8, "name": "copy", "dur": 1.0},
    {"ph": "X", "pid": 2, "tid": 7, "name": "host", "dur": 50.0},
    {"ph": "X", "pid": 1, "tid": 9, "name": "of no stream", "dur": 70.0},
    {"ph": "X", "pid": 1, "tid": 7, "name": "b", "dur": 4.0},
    {"ph": "X", "pid": 1, "tid": 7, "name": "a", "dur": 2.0},
  ]
  monkeypatch.setattr(kernel_timing, "_profile", lambda *_: events)
  assert busy_us(jnp.sin, 0.0, calls=2, programs=2) == 10.0 / 4
  with pytest.raises(RuntimeError, match="profiler saw 4 kernels"):
    busy_us(jnp.sin, 0.0, calls=5, programs=1)


def test_bytes_are_of_the_rblocks_that_tables_name():
  pool = jnp.zeros((9, 3, 2, 4, 16, 8), jnp.bfloat16)
  entries = jnp.zeros(6, jnp.int32)
  tables = BlockTables(
    entries, entries, jnp.asarray([0, 2]), jnp.asarray([2, 3])
  )
  assert named_bytes(pool, tables) == 5 * 2 * 4 * 16 * 8 * 2


@pytest.mark.parametrize("name", ["h200", "h200_rblock_sizes"])
def test_committed_rows_say_what_was_measured_and_on_what(name):
  path = pathlib.Path(f"experiments/results/kernel_bench/{name}.json")
  for row in json.loads(path.read_text()):
    fields = {"kernel", "case", "time_us", "peer", "peer_us", "ratio"}
    assert fields | {"device", "versions", "command", "date"} <= row.keys()
    assert row.keys() & {"tb_per_s", "tflop_per_s"}
    assert row.get("correct") is not False
