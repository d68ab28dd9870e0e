"""Times FlashInfer's kernels on paged KV, where FlashInfer and torch are there.

    python -m experiments.flashinfer_peer decode '[[64, 2048, 32, 8, 128]]'
    python -m experiments.flashinfer_peer prefill '[[2048, 32768, 32, 8, 128]]'

takes cases of batch (query tokens for prefill), context, query heads, KV heads
and head dim, and prints as its last line a list of microseconds, or null for a
case that it cannot do. A program of its own, so that its memory and its
libraries are.
"""

import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

_DECODE_PAGE = 64
_PREFILL_PAGE = 16  # As the anchors have it: FA3 takes any.
_NAMES = {"decode": "XQA", "prefill": f"FA3, page {_PREFILL_PAGE}"}
_LAYERS_BYTES = 12e9  # Of pools: enough layers that no cache holds them.
_CALLS = 24
_PREFILL_CALLS = 16  # Like the larger number of ours in one program.
_REPEATS = 9

Case = tuple[int, int, int, int, int]


def times_us(
  kernel: str, cases: Sequence[Case]
) -> tuple[str, list[float | None]]:
  """Times the cases in a process of their own.

  Args:
    kernel: `decode`, which is XQA, or `prefill`, which is FA3 and causal.
    cases: Batch or query tokens, context, query heads, KV heads and head dim.

  Returns:
    Name and version of the peer, empty if it is not there, and the times.
  """
  if not all(map(importlib.util.find_spec, ("torch", "flashinfer"))):
    return "", [None] * len(cases)
  command = [sys.executable, "-m", __name__, kernel, json.dumps(cases)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.stderr:
    print(f"FlashInfer: {done.stderr[-500:]}", flush=True)
  if done.returncode:
    return "", [None] * len(cases)
  version = importlib.metadata.version("flashinfer-python")
  name = f"FlashInfer {version} {_NAMES[kernel]}"
  return name, json.loads(done.stdout.splitlines()[-1])


def _decode_us(case: Case) -> float:
  """Median time of one call in a CUDA graph of many, by CUDA's events."""
  import flashinfer
  import torch

  batch, context, num_q_heads, num_kv_heads, head_dim = case
  num_pages = batch * context // _DECODE_PAGE
  pool_bytes = batch * context * num_kv_heads * head_dim * 4
  num_layers = int(max(2, min(16, _LAYERS_BYTES // pool_bytes)))
  shape = (num_pages + 1, 2, num_kv_heads, _DECODE_PAGE, head_dim)
  like = {"device": "cuda", "dtype": torch.bfloat16}
  pools = [torch.randn(shape, **like) for _ in range(num_layers)]
  tables = torch.randperm(num_pages, device="cuda").int() + 1
  lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
  workspace = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
  q = torch.randn(batch, num_q_heads, head_dim, **like)

  def call(i: int) -> None:
    flashinfer.decode.trtllm_batch_decode_with_kv_cache(
      q,
      pools[i % num_layers],
      workspace,
      tables.reshape(batch, -1),
      lengths,
      context,
      bmm1_scale=head_dim**-0.5,
      bmm2_scale=1.0,
      kv_layout="HND",
      backend="xqa",
    )

  call(0)
  torch.cuda.synchronize()
  # A graph, since launches from Python take longer than small kernels. Its
  # kernels overlap, so that each one's own time would say too much.
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    for i in range(_CALLS):
      call(i)
  return _median_us(graph.replay, _CALLS)


def _prefill_us(case: Case) -> float:
  """Median time of a causal call at the end of one context."""
  import flashinfer
  import torch

  query, context, num_q_heads, num_kv_heads, head_dim = case
  num_pages = context // _PREFILL_PAGE
  shape = (num_pages + 1, 2, _PREFILL_PAGE, num_kv_heads, head_dim)
  like = {"device": "cuda", "dtype": torch.bfloat16}
  pool = torch.randn(shape, **like)
  q = torch.randn(query, num_q_heads, head_dim, **like)
  attend = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
    torch.zeros(2**29, dtype=torch.uint8, device="cuda"), "NHD", backend="fa3"
  )

  def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")

  attend.plan(
    ints(0, query),
    ints(0, num_pages),
    torch.randperm(num_pages, device="cuda").int() + 1,
    ints(_PREFILL_PAGE),
    num_q_heads,
    num_kv_heads,
    head_dim,
    _PREFILL_PAGE,
    causal=True,
    q_data_type=torch.bfloat16,
    kv_data_type=torch.bfloat16,
  )

  def call() -> None:
    for _ in range(_PREFILL_CALLS):
      attend.run(q, pool)

  call()
  return _median_us(call, _PREFILL_CALLS)


def _median_us(run: Callable[[], None], calls: int) -> float:
  """Microseconds of one of the calls that a run makes, by CUDA's events."""
  import torch

  times = []
  for _ in range(_REPEATS):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end) * 1e3 / calls)
  return statistics.median(times)


def main(argv: Sequence[str]) -> None:
  """Times the cases of the command line."""
  results: list[float | None] = []
  time_us = {"decode": _decode_us, "prefill": _prefill_us}[argv[1]]
  for case in json.loads(argv[2]):
    try:
      results.append(time_us(tuple(case)))
    except Exception as error:  # Whatever it is that the peer cannot do.
      print(f"FlashInfer, {case}: {str(error)[:200]}", file=sys.stderr)
      results.append(None)
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv)
