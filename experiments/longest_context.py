"""The longest context: time of a token at growing lengths, and what bounds it.

KV is drawn, not computed, so that a length takes seconds to set up. HBM is
filled first; what does not fit lies in host memory and is streamed through HBM
for each token (`experiments/layered_decode.py`). All processes of a group
compute the same; process 0 writes down what comes out.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from matplotlib import figure

from experiments.layered_decode import LayeredDecode
from experiments.model_shape import model_shape
from experiments.report import table
from experiments.run_facts import run_facts
from infinite_llm.cache.host_memory import (
  check_host_memory,
  count_sharing,
  host_memory,
)
from infinite_llm.cache.kv_pool import POOL_SPECS
from infinite_llm.distributed.mesh import make_mesh, own_instances
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.distributed.runtime import current_group
from infinite_llm.errors import ConfigError
from infinite_llm.models.dummy_weights import draw_model

type Tell = Callable[[str], None]
"""Says how far it is."""


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Decodes at every length.

  Args:
    config: See `configs/longest_context.py`.
    workdir: Gets `rows.json`, written anew after each length, and `curve.png`.

  Returns:
    One row for each length, and whether all logits were finite (`correct`).
  """
  cluster = config.cluster
  if current_group() is None:  # A group has started JAX already.
    choose_platform(cluster.platform)
    check_platform(cluster.platform)
  about = {
    **run_facts(cluster.num_instances * cluster.tensor_parallel),
    "num_processes": jax.process_count(),
  }
  rows = []
  for row in _measure(config, functools.partial(print, flush=True)):
    rows.append({**row, **about})
    print(row, flush=True)
    text = json.dumps(rows, indent=1) + "\n"
    (workdir / "rows.json").write_text(text, encoding="utf-8")
  plot(rows, workdir / "curve.png", jax.devices()[0].device_kind)
  print(_report(rows))
  return {"rows": rows, "correct": all(row["is_finite"] for row in rows)}


def take_part(config: ml_collections.ConfigDict) -> None:
  """Computes the same as `run`, in any other process of a group.

  Args:
    config: That of all processes.
  """
  for _ in _measure(config, lambda text: None):
    pass


def _measure(
  config: ml_collections.ConfigDict, tell: Tell
) -> Iterator[dict[str, Any]]:
  """Gives a row for each length."""
  cluster = config.cluster
  mesh = make_mesh(cluster.num_instances, cluster.tensor_parallel)
  _check(config, len(own_instances(mesh)))
  started = time.perf_counter()
  model = draw_model(
    model_shape(config.model), mesh, seed=config.seed, dtype=config.model.dtype
  )
  jax.block_until_ready(model.state)
  tell(f"Weights drawn in {time.perf_counter() - started:.1f} s.")
  started = time.perf_counter()
  decode = LayeredDecode(
    model,
    block_size=config.cache.block_size,
    num_blocks=config.cache.num_blocks,
    slab_blocks=config.cache.slab_blocks,
    kv_dtype=config.cache.kv_dtype,
    most_staged=config.cache.most_staged,
  )
  decode.kv = jax.block_until_ready(_fill(decode.kv))
  tell(f"Pools filled in {time.perf_counter() - started:.1f} s.")
  for length in config.lengths:
    started = time.perf_counter()
    _grow(config, decode, length, tell)
    grown_s = time.perf_counter() - started
    tell(f"{length:,} tokens: there after {grown_s:.1f} s.")
    yield {**_time(config, decode, length), "grown_s": grown_s}


def _check(config: ml_collections.ConfigDict, num_own: int) -> None:
  """Refuses lengths that cannot be spread, and host memory that lacks.

  *Collective over all processes.*

  Args:
    config: As of `run`.
    num_own: Instances of this process.
  """
  block_size = config.cache.block_size
  unit = config.cluster.num_instances * block_size
  for length in config.lengths:
    if length < unit or length % unit:
      raise ConfigError(
        f"lengths must be positive multiples of num_instances x block_size"
        f" ({unit}); got {length}."
      )
  if list(config.lengths) != sorted(config.lengths):
    raise ConfigError(f"lengths must be rising; got {config.lengths}.")
  size = config.cache.slab_blocks
  if not 1 <= size < config.cache.num_blocks:
    raise ConfigError(
      f"slab_blocks must be in [1, num_blocks = {config.cache.num_blocks}); got"
      f" {size}."
    )
  slabs = num_own * _num_slabs(config, config.lengths[-1])
  # What is free is asked for before anybody takes of it.
  memory = host_memory(os.environ, jax.default_backend())
  check_host_memory(
    slabs * (1 + size) * _block_bytes(config),
    "lengths",
    config.lengths,
    dataclasses.replace(memory, num_sharing=count_sharing()),
  )


def _num_slabs(config: ml_collections.ConfigDict, length: int) -> int:
  """Whole slabs of each instance that leave no more than HBM takes."""
  blocks = length // (config.cluster.num_instances * config.cache.block_size)
  over = max(blocks - (config.cache.num_blocks - 1), 0)
  return -(-over // config.cache.slab_blocks)


def _block_bytes(config: ml_collections.ConfigDict) -> int:
  model = config.model
  vector = model.head_dim * jnp.dtype(config.cache.kv_dtype).itemsize
  heads = max(model.num_kv_heads, config.cluster.tensor_parallel)
  return 2 * model.num_layers * heads * config.cache.block_size * vector


def _grow(
  config: ml_collections.ConfigDict,
  decode: LayeredDecode,
  length: int,
  tell: Tell,
) -> None:
  """Spreads a context over HBM and, where that is full, host memory.

  The oldest rBlocks lie in host memory; the newest of all, which takes the
  token, is the last one of the last instance.
  """
  instances = config.cluster.num_instances
  per_instance = length // (instances * config.cache.block_size)
  size = config.cache.slab_blocks
  num_slabs = _num_slabs(config, length)
  started = time.perf_counter()
  for slab in range(len(decode.slabs), num_slabs):
    mine = range(slab * size, (slab + 1) * size)
    decode.slabs.add(
      _slab_layers(config, decode),
      [[n * instances + i for n in mine] for i in range(instances)],
    )
    taken_s = time.perf_counter() - started
    tell(
      f"{length:,} tokens: slab {slab + 1} of {num_slabs} in host memory"
      f" after {taken_s:.1f} s."
    )
  in_host = num_slabs * size
  count = per_instance - in_host
  decode.in_hbm = [
    [(1 + n, (in_host + n) * instances + i) for n in range(count)]
    for i in range(instances)
  ]


def _slab_layers(
  config: ml_collections.ConfigDict, decode: LayeredDecode
) -> list[jax.Array]:
  """The same drawn KV for every layer; each gets host memory of its own."""
  blocks = config.cluster.num_instances * (1 + config.cache.slab_blocks)
  shape = (blocks, 1, *decode.kv.shape[2:])
  draw = jax.jit(
    lambda: _drawn(shape, decode.kv.dtype),
    out_shardings=NamedSharding(decode.kv.sharding.mesh, POOL_SPECS.kv),
  )
  return [draw()] * config.model.num_layers


@functools.partial(jax.jit, donate_argnums=0)
def _fill(kv: jax.Array) -> jax.Array:
  """Adds drawn numbers to zeros: in place, for there is no room for two."""
  return kv + _drawn(kv.shape, kv.dtype)


def _drawn(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """Numbers in [-1, 1) that depend on their place."""
  place = jnp.zeros(shape, jnp.uint32)
  for dim, size in enumerate(shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    place = place * np.uint32(size) + index
  place *= np.uint32(0x9E3779B9)
  place = (place ^ place >> 15) * np.uint32(0x85EBCA6B)
  place ^= place >> 13
  numbers = (place >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
  return numbers.astype(dtype)


def _time(
  config: ml_collections.ConfigDict, decode: LayeredDecode, length: int
) -> dict[str, Any]:
  """Decodes the same last token again and again."""
  instances = config.cluster.num_instances
  times = []
  logits = np.empty(0, np.float32)
  for _ in range(1 + config.steps):
    started = time.perf_counter()
    logits = np.asarray(decode.step(1, length - 1))
    times.append(time.perf_counter() - started)
  token_s = statistics.median(times[1:])
  block_bytes = _block_bytes(config)
  in_hbm = len(decode.in_hbm[0]) * block_bytes
  # Null blocks of slabs travel too.
  in_host = len(decode.slabs) * (1 + config.cache.slab_blocks) * block_bytes
  return {
    "length": length,
    "tokens_in_hbm": instances
    * len(decode.in_hbm[0])
    * config.cache.block_size,
    "token_ms": token_s * 1e3,
    "hbm_tb_per_s": in_hbm / token_s / 1e12,
    "link_gb_per_s": in_host / token_s / 1e9,
    "all_links_gb_per_s": instances * in_host / token_s / 1e9,
    "is_finite": bool(np.isfinite(logits).all()),
    # What came out, to be compared between runs.
    "next_token": int(logits.argmax()),
    "largest_logit": float(logits.max()),
  }


def _report(rows: list[dict[str, Any]]) -> str:
  return table(
    "Decoding one request; bytes per second are of one instance",
    ["tokens", "in HBM", "ms a token", "HBM, TB/s", "link, GB/s"],
    [
      [
        f"{row['length']:,}",
        row["tokens_in_hbm"],
        row["token_ms"],
        f"{row['hbm_tb_per_s']:.2f}",
        f"{row['link_gb_per_s']:.1f}",
      ]
      for row in rows
    ],
  )


def plot(rows: list[dict[str, Any]], path: pathlib.Path, device: str) -> None:
  """Draws what a token takes against the context.

  Args:
    rows: As of `result.json`.
    path: Where to, a PNG file.
    device: What the rows were measured on.
  """
  matplotlib.use("agg")
  canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = canvas.subplots()
  axes.plot(
    [row["length"] for row in rows], [row["token_ms"] for row in rows], "o-"
  )
  full = [row for row in rows if row["tokens_in_hbm"] < row["length"]]
  if full:
    room = full[0]["tokens_in_hbm"]
    axes.axvspan(room, rows[-1]["length"], alpha=0.1, label="HBM is full")
    axes.legend()
  axes.set_yscale("log")
  axes.set_xlabel("context, tokens")
  axes.set_ylabel("ms a token")
  axes.set_title(f"One request, {device}")
  axes.grid(alpha=0.3)
  canvas.savefig(path, dpi=150)
