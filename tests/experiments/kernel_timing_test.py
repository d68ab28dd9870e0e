"""What counts as a run of a kernel."""

from experiments.kernel_timing import device_times


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
