"""Attention of one long request, spread in four ways, in the data plane bench.

Each way reads the same KV: on one device, with DistAttention, with ring
attention, with head-wise tensor parallelism. Layers follow each other as in a
model, the output of one being the query of the next.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.baselines.headwise_tp import headwise_attention
from experiments.baselines.ring_attention import RingPart, ring_attention
from experiments.kernel_timing import programs_slope_us
from experiments.one_sided_exchange import one_sided_exchanges
from infinite_llm.attention.decode_exchange import COLLECTIVES
from infinite_llm.attention.dist_attention import (
  NO_ROW,
  NO_VERSION,
  SpillSlots,
  Window,
  asked_positions,
  decode_attention,
  local_attention,
)
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.rules import require
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables

_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)
_KV_SPECS = {
  "one device": _PER_INSTANCE,
  "dist": _PER_INSTANCE,
  "dist, none spared": _PER_INSTANCE,
  "dist one-sided": _PER_INSTANCE,
  "ring": _PER_INSTANCE,
  "head-wise": PartitionSpec(None, None, None, INSTANCE_AXIS),
}
_MAX_ERROR = 8e-3  # Of bf16 outputs after some layers, as `_error` has it.
_FLOAT32_ERROR = 1e-4


class _Case(NamedTuple):
  """One context on some instances.

  Attributes:
    context: Tokens.
    num_instances: I.
    num_layers: Distinct ones.
  """

  context: int
  num_instances: int
  num_layers: int


def check_ways(config: ml_collections.ConfigDict) -> None:
  """Looks whether there is what the configuration wants timed.

  Args:
    config: See `configs/data_plane_bench.py`.

  Raises:
    ConfigError: If `attention.ways` names a way that there is not.
  """
  for way in config.attention.ways:
    require(way in _BODIES, "attention.ways", f"of {sorted(_BODIES)}", way)


def bench(
  config: ml_collections.ConfigDict, num_devices: int
) -> Iterator[dict[str, Any]]:
  """Times decode attention of one request at every length, in every way.

  Args:
    config: See `configs/data_plane_bench.py`.
    num_devices: Those that there are.

  Yields:
    Rows of the bench; one that needs more memory than is allowed says so.
  """
  alone_us: dict[int, float] = {}
  for context in config.attention.contexts:
    alone: dict[str, Any] = {}
    for num_instances in config.attention.num_instances:
      if num_instances > num_devices:
        continue
      case = _Case(context, num_instances, _num_layers(config, context))
      for way in _ways(config, num_instances):
        row = {
          "part": "attention",
          "way": way,
          "context": context,
          "instances": num_instances,
          "layers": case.num_layers,
        }
        if _kv_bytes(config, case) > config.attention.most_bytes:
          yield row | {"left_out": "its KV takes more than most_bytes"}
          continue
        if way == "head-wise" and config.model.num_kv_heads % num_instances:
          yield row | {"left_out": "KV heads cannot be cut so"}
          continue
        out, time_us = _run(config, case, way)
        if way == "one device":
          alone = {"out": out, "time_us": time_us}
          alone_us[context] = time_us
        row |= _results(config, case, out, time_us, alone)
        share_us = alone_us.get(context // num_instances)
        if way.startswith("dist") and share_us is not None:
          # An instance's share of the KV, without anybody to talk to.
          row["exchange_us"] = time_us - share_us
        yield row


def _ways(
  config: ml_collections.ConfigDict, num_instances: int
) -> tuple[str, ...]:
  """Ways to time; what differs on GPUs only is not timed elsewhere."""
  ways = ("one device",)
  if num_instances > 1:
    on_gpus = ("dist, none spared", "dist one-sided")
    more = on_gpus if config.platform == "gpu" else ()
    ways = ("dist", *more, "ring", "head-wise")
  wanted = config.attention.ways or ways
  return tuple(way for way in ways if way in wanted)


def _results(
  config: ml_collections.ConfigDict,
  case: _Case,
  out: np.ndarray,
  time_us: float,
  alone: dict[str, Any],
) -> dict[str, Any]:
  """What a row tells; compared with one device, where that held the KV."""
  error = _error(out, alone["out"]) if alone else None
  most = _MAX_ERROR if config.model.dtype == "bfloat16" else _FLOAT32_ERROR
  share_bytes = _kv_bytes(config, case) // case.num_layers
  return {
    "layer_us": time_us,
    "tb_per_s": share_bytes * case.num_instances / time_us / 1e6,
    "speedup": alone["time_us"] / time_us if alone else None,
    "error": error,
    "correct": error is None or error < most,
    "aim": "dist on 4: 3.2x at 1M tokens, 3.6x at 3.5M; exchange below 25 us",
  }


def _num_blocks(config: ml_collections.ConfigDict, case: _Case) -> int:
  """rBlocks of each instance; whole ones, equally many."""
  per_instance = case.context // case.num_instances
  return max(per_instance // config.model.block_size, 1)


def _kv_bytes(config: ml_collections.ConfigDict, case: _Case) -> int:
  """Bytes of an instance's part of the KV, all layers."""
  model = config.model
  itemsize = jnp.dtype(model.dtype).itemsize
  vector = model.num_kv_heads * model.head_dim * itemsize
  tokens = _num_blocks(config, case) * model.block_size
  return case.num_layers * 2 * vector * tokens


def _num_layers(config: ml_collections.ConfigDict, context: int) -> int:
  """As many as one device has room for, equally many for every way."""
  one = _kv_bytes(config, _Case(context, 1, 1))
  fit = int(config.attention.most_bytes // one)
  return max(min(fit, config.attention.layers), 1)


def _run(
  config: ml_collections.ConfigDict, case: _Case, way: str
) -> tuple[np.ndarray, float]:
  """Output after the fewer calls, and microseconds of a call."""
  mesh = make_mesh(case.num_instances, 1)
  kv = _draw_kv(config, case, mesh, way)
  body = functools.partial(_BODIES[way], config, case)
  q = np.random.default_rng(config.seed).standard_normal(
    (1, config.model.num_q_heads, config.model.head_dim)
  )
  q = jax.device_put(
    q.astype(config.model.dtype), NamedSharding(mesh, PartitionSpec())
  )

  def program(num_calls: int) -> Callable[..., jax.Array]:
    return jax.jit(
      jax.shard_map(
        functools.partial(body, num_calls),
        mesh=mesh,
        in_specs=(PartitionSpec(), _KV_SPECS[way]),
        out_specs=_PER_INSTANCE,
        check_vma=False,
      )
    )

  programs = [program(num_calls) for num_calls in config.attention.calls]
  outs = [np.asarray(run(q, kv), np.float32) for run in programs]
  calls = config.attention.calls
  return outs[0][:1], programs_slope_us(config.repeats, calls, programs, q, kv)


def _draw_kv(
  config: ml_collections.ConfigDict, case: _Case, mesh: Mesh, way: str
) -> Any:
  """KV that depends only on layer, token and head, wherever it lies.

  Returns:
    `[I * (1 + M), L, 2, K, P, D]`: each instance's rBlocks behind a null block.
    For ring attention a tuple of such arrays of one layer each; for head-wise
    parallelism all rBlocks, behind one null block.
  """
  model = config.model
  instances = 1 if way == "head-wise" else case.num_instances
  count = _num_blocks(config, case) * case.num_instances // instances
  vectors = (2, model.num_kv_heads, model.block_size, model.head_dim)

  def draw(num_layers: int, first_layer: jax.Array) -> jax.Array:
    sizes = (instances, 1 + count, num_layers, *vectors)
    at = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, sizes)
    # The place of each number in the request, however it is spread.
    place = at(0) * np.uint32(count) + at(1)
    place = place * np.uint32(case.num_layers) + at(2) + first_layer
    for dim, size in enumerate(vectors, start=3):
      place = place * np.uint32(size) + at(dim)
    place *= np.uint32(0x9E3779B9)
    place = (place ^ place >> 15) * np.uint32(0x85EBCA6B)
    place ^= place >> 13
    numbers = (place >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
    return numbers.astype(model.dtype).reshape(-1, num_layers, *vectors)

  run = jax.jit(
    draw,
    static_argnums=0,
    out_shardings=NamedSharding(mesh, _KV_SPECS[way]),
  )
  if way != "ring":
    return run(case.num_layers, np.uint32(0))
  return tuple(run(1, np.uint32(i)) for i in range(case.num_layers))


def _window(config: ml_collections.ConfigDict) -> Window:
  return Window(config.model.head_dim**-0.5, None, 1)


def _me() -> jax.Array:
  return jax.lax.axis_index(INSTANCE_AXIS)


def _tables(count: int, first_logical: jax.Array | int) -> BlockTables:
  """One row: rBlocks 1 to `count` of the pool, in order."""
  ids = jnp.arange(count, dtype=jnp.int32)
  return BlockTables(
    block_ids=1 + ids,
    logical_ids=first_logical + ids,
    starts=jnp.zeros((1,), jnp.int32),
    counts=jnp.full((1,), count, jnp.int32),
  )


def _position(config: ml_collections.ConfigDict, case: _Case) -> jax.Array:
  """Of the only query: that of the last token."""
  tokens = _num_blocks(config, case) * case.num_instances
  return jnp.full((1,), tokens * config.model.block_size - 1, jnp.int32)


_ONE = np.asarray([0, 1], np.int32)
_COLLECTIVES = itertools.repeat(COLLECTIVES)  # For each call of a program.


def _one_device(config, case, num_calls, q, kv):
  tables = _tables(_num_blocks(config, case), 0)
  for call in range(num_calls):
    state = local_attention(
      q,
      _ONE,
      _position(config, case),
      kv,
      call % case.num_layers,
      tables,
      _window(config),
    )
    q = _next(q, state.out)
  return q


def _dist(config, case, num_calls, q, kv, exchanges=_COLLECTIVES):
  """Instance 0 owns the request; everybody answers its one spill slot."""
  count = _num_blocks(config, case)
  tables = _tables(count, _me() * count)
  is_owner = _me() == 0
  owner_rows = jnp.arange(case.num_instances) == 0
  nothing = jnp.zeros((case.num_instances,), jnp.int32)
  answered = tables._replace(
    starts=nothing, counts=jnp.where(owner_rows & ~is_owner, count, 0)
  )
  own = tables._replace(counts=jnp.where(is_owner, tables.counts, 0))
  slots = SpillSlots(
    rows=jnp.where(is_owner, 0, NO_ROW)[None],
    epoch=jnp.zeros((1,), jnp.uint32),
    versions=jnp.full((1, case.num_instances), NO_VERSION, jnp.int32),
  )
  positions = jnp.where(is_owner, _position(config, case), -1)
  asked = asked_positions(positions, slots)
  for call, exchange in zip(range(num_calls), exchanges, strict=False):
    state = decode_attention(
      q,
      positions,
      kv,
      call % case.num_layers,
      own,
      answered,
      asked,
      slots,
      _window(config),
      exchange,
    )
    q = _next(q, state.out)
  return q


class _NoneSpared:
  """As `COLLECTIVES`, though local attention takes all multiprocessors."""

  gather_queries = staticmethod(COLLECTIVES.gather_queries)

  def return_states[Result](
    self,
    hosted: AttentionState,
    beside: Callable[[jax.Array, int], Result],
    operand: jax.Array,
  ) -> tuple[AttentionState, Result]:
    return COLLECTIVES.return_states(hosted, lambda q, _: beside(q, 0), operand)


def _dist_none_spared(config, case, num_calls, q, kv):
  return _dist(config, case, num_calls, q, kv, itertools.repeat(_NoneSpared()))


def _dist_one_sided(config, case, num_calls, q, kv):
  exchanges = one_sided_exchanges(1, *q.shape[1:], q.dtype)
  return _dist(config, case, num_calls, q, kv, exchanges)


def _ring(config, case, num_calls, q, kv):
  """Instance 0 has the query; the others pass their KV on."""
  count = _num_blocks(config, case)
  positions = jnp.where(_me() == 0, _position(config, case), -1)
  ids = _me() * count + jnp.arange(-1, count, dtype=jnp.int32)
  for call in range(num_calls):
    part = RingPart(kv[call % case.num_layers], ids, jnp.int32(count))
    state = ring_attention(q, _ONE, positions, part, _window(config))
    q = _next(q, state.out)
  return q


def _headwise(config, case, num_calls, q, kv):
  tables = _tables(_num_blocks(config, case) * case.num_instances, 0)
  for call in range(num_calls):
    state = headwise_attention(
      q,
      _ONE,
      _position(config, case),
      kv,
      call % case.num_layers,
      tables,
      _window(config),
    )
    q = _next(q, state.out)
  return q


def _next(q: jax.Array, out: jax.Array) -> jax.Array:
  """The next layer's query: it waits for this layer, and stays of order 1."""
  return (q + out.astype(q.dtype)) * 0.7


_BODIES = {
  "one device": _one_device,
  "dist": _dist,
  "dist, none spared": _dist_none_spared,
  "dist one-sided": _dist_one_sided,
  "ring": _ring,
  "head-wise": _headwise,
}


def _error(out: np.ndarray, right: np.ndarray) -> float:
  """`||out - right|| / ||right||`."""
  return float(np.linalg.norm(out - right) / np.linalg.norm(right))
