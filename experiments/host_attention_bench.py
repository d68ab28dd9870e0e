"""A request larger than HBM, in the data plane bench: as its caller sees it."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from experiments.model_shape import model_shape
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.models.dummy_weights import draw_model
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import Tier


def bench(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """Times an engine of one instance that has most of a request in host memory.

  Args:
    config: See `configs/data_plane_bench.py`; reads `host_attention`.

  Yields:
    Rows of the bench, one for each dtype of keys and values.
  """
  sizes = config.host_attention
  model = draw_model(
    model_shape(config.model),
    make_mesh(1, 1),
    seed=config.seed,
    dtype=config.model.dtype,
  )
  draw = np.random.default_rng(config.seed)
  prompt = draw.integers(config.model.vocab_size, size=sizes.prompt_tokens)
  for kv_dtype in sizes.kv_dtypes:
    engine = Engine(
      model,
      engine_config(
        block_size=config.model.block_size,
        num_blocks=sizes.num_blocks,
        host_blocks=sizes.host_blocks,
        host_attention=True,
        kv_dtype=kv_dtype,
        dtype=config.model.dtype,
        max_num_seqs=1,
        decode_buckets=(1,),
        prefill_buckets=(sizes.chunk_tokens,),
        prefill_rows=1,
        headroom_blocks=0,
      ),
    )
    engine.warm_up()
    yield {
      "part": "host attention",
      "kv_dtype": kv_dtype,
      "tokens": sizes.prompt_tokens,
      "slab_blocks": engine.config.cache.slab_blocks,
      **_answer(engine, prompt, sizes.max_tokens),
    }


def _answer(engine: Engine, prompt: np.ndarray, count: int) -> dict[str, Any]:
  """Times the tokens of one request, and what the link gave meanwhile."""
  engine.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
  started = time.perf_counter()
  times: list[float] = []
  in_host, is_right = 0, False
  while engine.has_unfinished():
    for output in engine.step():
      times.append(time.perf_counter() - started)
      is_right = len(output.token_ids) == count
    counts = engine.group.managers[0].counts(Tier.HOST)
    in_host = max(in_host, counts.total - counts.free)
  token_s = statistics.median(np.diff(times)[1:])
  streamed = in_host * engine.runner.pool.block_bytes
  return {
    "blocks_in_host": in_host,
    "prompt_s": times[0],
    "token_ms": token_s * 1e3,
    "gb_per_s": streamed / token_s / 1e9,
    "correct": is_right and in_host > 0,
  }
