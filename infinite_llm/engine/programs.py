"""The compiled programs: one function per kind, `shard_map` at the top.

Local programs run on an instance's own row of the mesh and contain no
collective over "instance"; group programs run on the whole mesh. Both take the
same trees with a leading axis over the instances they cover.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.attention import dist_attention
from infinite_llm.attention.dist_attention import (
  HostedRows,
  SpillSlots,
  Window,
)
from infinite_llm.cache import movement
from infinite_llm.cache.kv_pool import (
  POOL_SPECS,
  PoolArrays,
  coverage,
  write_entries,
)
from infinite_llm.cache.movement import ARRIVAL_SPEC, Arrivals
from infinite_llm.cache.packed_rows import PackedRows
from infinite_llm.models.registry import ModelConfig
from infinite_llm.types import INSTANCE_AXIS, Shift
from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.micro_attention.api import BlockTables

_PER_INSTANCE = PartitionSpec("instance")


class Params(NamedTuple):
  """What all steps read and none changes.

  Attributes:
    weights: The model's state.
    kv_scales: `[L, 2, K]` float32. What keys and values in the pools are
      multiplied by; None where they are kept as they are.
  """

  weights: Any
  kv_scales: jax.Array | None = None


class StepOutput(NamedTuple):
  """What a step gives for each row.

  Attributes:
    logits: `[I * B, V]` float32 of each row's last token.
    proved: `[I * B]` bool. Whether the row read just what it demanded.
  """

  logits: jax.Array
  proved: jax.Array


class GroupInputs(NamedTuple):
  """What a group program needs beside the batch.

  Attributes:
    hosted: Where each instance finds what it hosts.
    slots: Spill slots of each owner i, and `[I]` bool: entry s is whether it
      has rBlocks on i + s.
  """

  hosted: PackedRows[HostedRows]
  slots: PackedRows[tuple[SpillSlots, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepKind:
  """Static part of a step program.

  Attributes:
    is_group: Over the whole mesh, with spill slots.
    is_prefill: Rows may have many query tokens.
  """

  is_group: bool
  is_prefill: bool

  @property
  def name(self) -> str:
    """What the program is called where launches are counted."""
    scope = "group" if self.is_group else "local"
    return f"{scope}_{'prefill' if self.is_prefill else 'decode'}"


def build_step(
  kind: StepKind,
  graphdef: Any,
  model_config: ModelConfig,
  param_specs: Any,
  mesh: Mesh,
  *,
  num_tokens: int,
  attention: str | None = None,
) -> Callable[..., tuple[PoolArrays, StepOutput]]:
  """Builds a step program.

  Args:
    kind: Which program.
    graphdef: Static part of the NNX model.
    model_config: Its configuration.
    param_specs: Partition over `mesh` of the model's `Params`.
    mesh: Row mesh for a local program, the whole mesh for a group program.
    num_tokens: T, query tokens of each instance.
    attention: Name of the micro-attention; None picks.

  Returns:
    Jitted `(params, pool, batch[, more]) -> (pool, output)`. Donates `pool`. A
    group program takes `GroupInputs` more, a local decode program the `[S]`
    int32 newest tokens of a sampler's slots; only there tokens may come of it.
  """
  window = functools.partial(
    Window,
    scale=model_config.head_dim**-0.5,
    max_query_tokens=num_tokens if kind.is_prefill else 1,
    implementation=attention,
  )

  takes_newest = not (kind.is_group or kind.is_prefill)

  def body(params, pool, batch, more=None):
    batch = batch.own()
    tokens = batch.tokens
    if kind.is_group:
      hosted = more.hosted.own()
      slots, shifts = more.slots.own()
    elif takes_newest:
      newest = more[jnp.maximum(batch.token_slots, 0)]
      tokens = jnp.where(batch.token_slots < 0, tokens, newest)
    # Entries and tags first: coverage is then of what attention will read.
    pool = write_entries(pool, batch.writes)
    tables = pool.tables(batch.starts, batch.counts)
    pool = pool._replace(
      tag=pool.tag.at[batch.tag_block].set(
        jnp.where(batch.tag_block == 0, jnp.uint32(0), batch.tag_value)
      )
    )
    answered = asked = holders = None
    if kind.is_group:
      if kind.is_prefill:
        holders = dist_attention.needed_anywhere(shifts)
      else:
        asked = dist_attention.asked_positions(batch.positions, slots)
      answered = dist_attention.answer_slots(hosted, tables, slots)
      covered = dist_attention.dist_coverage(
        pool.tag,
        tables,
        answered,
        slots,
        holders,
      )
    else:
      covered = coverage(pool.tag, tables)

    def attend(layer, q, k, v, kv):
      scales = {}
      if params.kv_scales is not None:
        k_scale, v_scale = params.kv_scales[layer]
        scales = {"k_scale": k_scale, "v_scale": v_scale}
      kv = append_kv(
        kv, layer, k, v, batch.append_block, batch.append_offset, **scales
      )
      layer_window = window(
        sliding_window=model_config.layer_window(layer), **scales
      )
      if not kind.is_group:
        state = dist_attention.local_attention(
          q,
          batch.cu_seqlens,
          batch.positions,
          kv,
          layer,
          tables,
          layer_window,
        )
      elif kind.is_prefill:
        state = dist_attention.prefill_attention(
          q,
          batch.cu_seqlens,
          batch.positions,
          kv,
          layer,
          tables,
          answered,
          slots,
          holders,
          layer_window,
        )
      else:
        state = dist_attention.decode_attention(
          q,
          batch.positions,
          kv,
          layer,
          tables,
          answered,
          asked,
          slots,
          layer_window,
        )
      return state.out.astype(q.dtype), kv

    model = nnx.merge(graphdef, params.weights)
    hidden, kv = model(tokens, batch.positions, pool.kv, attend)
    last = jnp.maximum(batch.cu_seqlens[1:] - 1, 0)
    logits = model.logits(hidden[last])
    proved = covered == batch.demand
    return pool._replace(kv=kv), StepOutput(logits, proved)

  in_specs = (param_specs, POOL_SPECS, _PER_INSTANCE)
  if kind.is_group:
    in_specs += (_PER_INSTANCE,)
  elif takes_newest:
    in_specs += (PartitionSpec(),)
  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=(POOL_SPECS, StepOutput(_PER_INSTANCE, _PER_INSTANCE)),
      check_vma=False,
    ),
    donate_argnums=(1,),
  )


def build_verify(mesh: Mesh) -> Callable[..., jax.Array]:
  """Builds the coverage check without tokens, over the whole mesh.

  Returns:
    Jitted `(tag [I*N], block_ids [I*E], logical_ids [I*E], batch, group) ->
    proved [I * S]`; row `s` of an instance is its spill slot `s`.
  """

  def body(tag, block_ids, logical_ids, batch, group):
    batch, hosted = batch.own(), group.hosted.own()
    slots, _ = group.slots.own()
    tables = BlockTables(block_ids, logical_ids, batch.starts, batch.counts)
    answered = dist_attention.answer_slots(hosted, tables, slots)
    covered = dist_attention.dist_coverage(tag, tables, answered, slots)
    return covered == batch.demand

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(
        POOL_SPECS.tag,
        POOL_SPECS.block_ids,
        POOL_SPECS.logical_ids,
        _PER_INSTANCE,
        _PER_INSTANCE,
      ),
      out_specs=_PER_INSTANCE,
      check_vma=False,
    )
  )


def build_exchange(
  mesh: Mesh, shift: Shift, *, verify: bool = False
) -> Callable[..., tuple[PoolArrays, Arrivals | None]]:
  """Builds the exchange of rBlocks between all instances i and i + shift.

  Contains no conditional: launching it never waits for a device.

  Args:
    mesh: Of the whole group.
    shift: In [1, I).
    verify: Whether to compute checksums of both ends.

  Returns:
    Jitted `(pool, payloads) -> (pool, arrivals)`, with payloads of each
    instance, all of one quota. Donates `pool`.

  Raises:
    ValueError: If there is no such shift.
  """
  num_instances = mesh.shape[INSTANCE_AXIS]
  if not 0 < shift < num_instances:
    raise ValueError(f"shift must be in [1, {num_instances}); got {shift}.")

  def body(pool, payloads):
    return movement.exchange(pool, payloads.own(), shift, verify=verify)

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(POOL_SPECS, _PER_INSTANCE),
      out_specs=(POOL_SPECS, ARRIVAL_SPEC if verify else None),
      check_vma=False,
    ),
    donate_argnums=(0,),
  )


def build_grant(mesh: Mesh) -> Callable[..., PoolArrays]:
  """Builds the local program that records reservation epochs.

  Returns:
    Jitted `(pool, granted) -> pool`, where `granted` are `[G]` rBlocks and
    `[G]` epochs. Donates `pool`.
  """

  def body(pool, granted):
    return movement.grant_epochs(pool, *granted.own())

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(POOL_SPECS, _PER_INSTANCE),
      out_specs=POOL_SPECS,
      check_vma=False,
    ),
    donate_argnums=(0,),
  )


def build_write_entries(mesh: Mesh) -> Callable[..., PoolArrays]:
  """Builds the local program that writes table entries.

  Returns:
    Jitted `(pool, writes) -> pool`. Donates `pool`.
  """

  def body(pool, writes):
    return write_entries(pool, writes.own())

  return jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(POOL_SPECS, _PER_INSTANCE),
      out_specs=POOL_SPECS,
      check_vma=False,
    ),
    donate_argnums=(0,),
  )
