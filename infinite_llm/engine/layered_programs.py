"""Programs of a step that attends HOST: a few short ones for every layer.

Between them host memory brings what the next one reads of a layer's slabs.
`begin`, then for each layer `front`, `add` for a few slabs at a time and
`back`, then `end`. All run on an instance's own row of the mesh; where the
request has rBlocks at other instances too, `group_front` on all of it takes the
place of `front`. Every layer proves what it read, in HBM and from slabs: a row
is proved if all of them did.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.attention import dist_attention
from infinite_llm.attention.dist_attention import Window
from infinite_llm.attention.host_attention import staged_attention
from infinite_llm.cache.host_slabs import TABLE_SPECS
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays, coverage
from infinite_llm.engine.programs import Params, StepOutput
from infinite_llm.engine.step_batch import StepBatch
from infinite_llm.models import rope
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import INSTANCE_AXIS, TENSOR_AXIS
from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.attention_state import AttentionState

_NONE = PartitionSpec()
_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)
_QUERIES = PartitionSpec(INSTANCE_AXIS, TENSOR_AXIS)
_STATES = AttentionState(_QUERIES, _QUERIES)

SLABS_TOGETHER = 4
"""Whose parts of a layer a decode step attends in one program: what the host
does for a transfer and a program takes longer than the link for one slab."""

ATTENDED_SPECS = (_QUERIES, _STATES, _PER_INSTANCE)
"""Partition of what `front` and `group_front` give beside the pool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredPrograms:
  """Builders of the programs of a mesh, for one number of tokens.

  Attributes:
    model: Shape and static part; its parameters are arguments.
    layer_def: Static part of each of its layers.
    param_specs: Partition over `mesh` of its `Params`.
    mesh: Row of an instance; for `group_front` that of the whole group.
    num_tokens: T; 1 is a decode step.
    attention: Name of the micro-attention; None picks.
  """

  model: LoadedModel
  layer_def: Any
  param_specs: Params
  mesh: Mesh
  num_tokens: int
  attention: str | None

  @property
  def slabs_together(self) -> int:
    """Slabs that `add` takes. A chunk of a prompt keeps devices busy by one."""
    return SLABS_TOGETHER if self.num_tokens == 1 else 1

  def begin(self) -> Callable[..., Any]:
    """Names what the step writes, and embeds its tokens.

    Returns:
      Jitted `(weights, pool, batch) -> (pool, x [T, dim], proved [1])`. Donates
      `pool`.
    """

    def body(weights, pool, batch):
      batch = batch.own()
      tag = pool.tag.at[batch.tag_block].set(
        jnp.where(batch.tag_block == 0, jnp.uint32(0), batch.tag_value)
      )
      x = self._merge(weights).embed_tokens.embed(batch.tokens, TENSOR_AXIS)
      return pool._replace(tag=tag), x, jnp.ones(1, bool)

    specs = (self.param_specs.weights, POOL_SPECS, _PER_INSTANCE)
    outputs = (POOL_SPECS, _PER_INSTANCE, _PER_INSTANCE)
    return self._jit(body, specs, outputs, donated=(1,))

  def front(self) -> Callable[..., Any]:
    """Appends a layer's keys and values and attends what is in HBM.

    Returns:
      Jitted `(layer_weights, x, pool, layer, kv_scales, batch, tables) ->
      (pool, q, state, covered [1])`. Donates `pool`.
    """

    def body(weights, x, pool, layer, kv_scales, batch, tables):
      batch, tables = batch.own(), tables.own()

      def read(q, kv, window):
        return dist_attention.local_attention(
          q, batch.cu_seqlens, batch.positions, kv, layer, tables, window
        )

      pool, q, state = self._append(
        weights, x, pool, layer, kv_scales, batch, read
      )
      return pool, q, state, coverage(pool.tag, tables)

    return self._jit(body, self._front_specs, self._attended, donated=(2,))

  def group_front(self) -> Callable[..., Any]:
    """As `front`, and other instances attend what they hold of the request.

    Collective over axis: "instance". Instances without rows only answer.

    Returns:
      Jitted `(layer_weights, x, pool, layer, kv_scales, batch, tables, group)
      -> (pool, q, state, covered [I])`. Donates `pool`.
    """
    is_prefill = self.num_tokens > 1

    def body(weights, x, pool, layer, kv_scales, batch, tables, group):
      batch, tables = batch.own(), tables.own()
      slots, _ = group.slots.own()
      # What is hosted is named by entries beside the pool: they come behind.
      behind = tables.block_ids.shape[0]
      tables = tables._replace(
        block_ids=jnp.concatenate([tables.block_ids, pool.block_ids]),
        logical_ids=jnp.concatenate([tables.logical_ids, pool.logical_ids]),
      )
      answered = dist_attention.answer_slots(group.hosted.own(), tables, slots)
      answered = answered._replace(starts=answered.starts + behind)

      def read(q, kv, window):
        held = (kv, layer, tables, answered)
        if is_prefill:  # To all: no time beside that of the host's link.
          return dist_attention.prefill_attention(
            q, batch.cu_seqlens, batch.positions, *held, slots, None, window
          )
        asked = dist_attention.asked_positions(batch.positions, slots)
        return dist_attention.decode_attention(
          q, batch.positions, *held, asked, slots, window
        )

      pool, q, state = self._append(
        weights, x, pool, layer, kv_scales, batch, read
      )
      covered = dist_attention.dist_coverage(pool.tag, tables, answered, slots)
      return pool, q, state, covered

    specs = (*self._front_specs, _PER_INSTANCE)
    return self._jit(body, specs, self._attended, donated=(2,))

  def add(self) -> Callable[..., Any]:
    """Attends a layer of some slabs, one after the other.

    Returns:
      Jitted `(state, covered, q, layer, kv_scales, batch, staged) -> (state,
      covered)`, where `staged` are as many as `slabs_together`.
    """

    def body(state, covered, q, layer, kv_scales, batch, staged):
      batch = batch.own()
      window = self._window(kv_scales, layer)
      for part, tag, tables in staged:
        state = staged_attention(
          state, q, batch.cu_seqlens, batch.positions, part, tables, window
        )
        covered += coverage(tag, tables)
      return state, covered

    read = (_NONE, self.param_specs.kv_scales, _PER_INSTANCE)
    staged = (POOL_SPECS.kv, POOL_SPECS.tag, TABLE_SPECS)
    slabs = (staged,) * self.slabs_together
    specs = (_STATES, _PER_INSTANCE, _QUERIES, *read, slabs)
    return self._jit(body, specs, (_STATES, _PER_INSTANCE))

  def back(self) -> Callable[..., Any]:
    """Ends a layer with what was attended.

    Returns:
      Jitted `(layer_weights, x, batch, state, covered, proved) -> (x, proved)`.
    """

    def body(weights, x, batch, state, covered, proved):
      batch = batch.own()

      def attend(q, k, v, cache):
        return state.out.astype(q.dtype), cache

      x, _ = self._merge_layer(weights)(
        x, self._rotation(batch.positions), None, attend, TENSOR_AXIS
      )
      return x, proved & (covered == batch.demand)

    rows = (_PER_INSTANCE, _PER_INSTANCE)
    specs = (self._layer_specs, *rows, _STATES, *rows)
    return self._jit(body, specs, rows)

  def end(self) -> Callable[..., Any]:
    """Gives the logits of the last token.

    Returns:
      Jitted `(weights, x, batch, proved) -> StepOutput` of one row.
    """

    def body(weights, x, batch, proved):
      batch = batch.own()
      model = self._merge(weights)
      last = jnp.maximum(batch.cu_seqlens[1:] - 1, 0)
      return StepOutput(model.logits(model.norm(x)[last]), proved)

    specs = (self.param_specs.weights, *[_PER_INSTANCE] * 3)
    return self._jit(body, specs, StepOutput(_PER_INSTANCE, _PER_INSTANCE))

  def _append(
    self,
    weights: Any,
    x: jax.Array,
    pool: PoolArrays,
    layer: jax.Array,
    kv_scales: jax.Array | None,
    batch: StepBatch,
    read: Callable[[jax.Array, jax.Array, Window], AttentionState],
  ) -> tuple[PoolArrays, jax.Array, AttentionState]:
    """A layer's queries, and what they read once its keys are in the pool."""
    window = self._window(kv_scales, layer)
    kept: list[tuple[jax.Array, AttentionState]] = []

    def attend(q, k, v, kv):
      kv = append_kv(
        kv,
        layer,
        k,
        v,
        batch.append_block,
        batch.append_offset,
        k_scale=window.k_scale,
        v_scale=window.v_scale,
      )
      kept.append((q, read(q, kv, window)))
      return jnp.zeros_like(q), kv  # What follows is computed by `back`.

    module = self._merge_layer(weights)
    _, kv = module.self_attn(
      module.input_layernorm(x),
      self._rotation(batch.positions),
      pool.kv,
      attend,
      TENSOR_AXIS,
    )
    ((q, state),) = kept
    return pool._replace(kv=kv), q, state

  @property
  def _front_specs(self) -> tuple[Any, ...]:
    """Partition of what `front` takes."""
    read = (_NONE, self.param_specs.kv_scales, _PER_INSTANCE, _PER_INSTANCE)
    return (self._layer_specs, _PER_INSTANCE, POOL_SPECS, *read)

  @property
  def _attended(self) -> tuple[Any, ...]:
    """Partition of what it gives."""
    return (POOL_SPECS, *ATTENDED_SPECS)

  @property
  def _layer_specs(self) -> Any:
    """Partition of one layer's weights, which is that of all."""
    return self.param_specs.weights["layers"][0]

  def _merge(self, weights: Any) -> Any:
    return nnx.merge(self.model.graphdef, weights)

  def _merge_layer(self, weights: Any) -> Any:
    return nnx.merge(self.layer_def, weights)

  def _rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    config = self.model.config
    radians = rope.frequencies(config.rope, config.head_dim)
    return rope.rotation(positions, radians)

  def _window(self, kv_scales: jax.Array | None, layer: jax.Array) -> Window:
    """All that is before a query, and the scales of a layer if it has any."""
    k_scale, v_scale = (None, None) if kv_scales is None else kv_scales[layer]
    return Window(
      scale=self.model.config.head_dim**-0.5,
      sliding_window=None,
      max_query_tokens=self.num_tokens,
      implementation=self.attention,
      k_scale=k_scale,
      v_scale=v_scale,
    )

  def _jit(
    self,
    body: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    donated: tuple[int, ...] = (),
  ) -> Callable[..., Any]:
    return jax.jit(
      jax.shard_map(
        body,
        mesh=self.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      ),
      donate_argnums=donated,
    )
