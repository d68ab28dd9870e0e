"""Programs of a step that attends HOST: a few short ones for every layer.

Between them host memory brings the next slab's part of a layer. `begin`, then
for each layer `front`, `add` for each slab and `back`, then `end`. All run on
an instance's own row of the mesh. Every layer proves what it read, in HBM and
from slabs: a row is proved if all of them did.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.attention.host_attention import staged_attention
from infinite_llm.cache.host_slabs import TABLE_SPECS
from infinite_llm.cache.kv_pool import POOL_SPECS, coverage
from infinite_llm.engine.programs import Params, StepOutput
from infinite_llm.models import rope
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import INSTANCE_AXIS, TENSOR_AXIS
from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.attention_state import AttentionState

_NONE = PartitionSpec()
_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)
_QUERIES = PartitionSpec(None, TENSOR_AXIS)
_STATES = AttentionState(_QUERIES, _QUERIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredPrograms:
  """Builders of the programs of one instance, for one number of tokens.

  Attributes:
    model: Shape and static part; its parameters are arguments.
    layer_def: Static part of each of its layers.
    param_specs: Partition over `mesh` of its `Params`.
    mesh: Row of the instance.
    num_tokens: T; 1 is a decode step.
    attention: Name of the micro-attention; None picks.
  """

  model: LoadedModel
  layer_def: Any
  param_specs: Params
  mesh: Mesh
  num_tokens: int
  attention: str | None

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
    return self._jit(body, specs, (POOL_SPECS, _NONE, _NONE), donated=(1,))

  def front(self) -> Callable[..., Any]:
    """Appends a layer's keys and values and attends what is in HBM.

    Returns:
      Jitted `(layer_weights, x, pool, layer, kv_scales, batch, tables) ->
      (pool, q, state, covered [1])`. Donates `pool`.
    """

    def body(weights, x, pool, layer, kv_scales, batch, tables):
      batch, tables = batch.own(), tables.own()
      module = self._merge_layer(weights)
      window = self._window(kv_scales, layer)
      kept = []

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
        state = local_attention(
          q,
          batch.cu_seqlens,
          batch.positions,
          kv,
          layer,
          tables,
          window,
        )
        kept.append((q, state))
        return jnp.zeros_like(q), kv  # What follows is computed by `back`.

      _, kv = module.self_attn(
        module.input_layernorm(x),
        self._rotation(batch.positions),
        pool.kv,
        attend,
        TENSOR_AXIS,
      )
      ((q, state),) = kept
      return pool._replace(kv=kv), q, state, coverage(pool.tag, tables)

    read = (_NONE, self.param_specs.kv_scales, _PER_INSTANCE, _PER_INSTANCE)
    specs = (self._layer_specs, _NONE, POOL_SPECS, *read)
    outputs = (POOL_SPECS, _QUERIES, _STATES, _NONE)
    return self._jit(body, specs, outputs, donated=(2,))

  def add(self) -> Callable[..., Any]:
    """Attends a layer of one slab.

    Returns:
      Jitted `(state, covered, q, layer, kv_scales, batch, staged, tag, tables)
      -> (state, covered)`.
    """

    def body(state, covered, q, layer, kv_scales, batch, staged, tag, tables):
      batch = batch.own()
      state = staged_attention(
        state,
        q,
        batch.cu_seqlens,
        batch.positions,
        staged,
        tables,
        self._window(kv_scales, layer),
      )
      return state, covered + coverage(tag, tables)

    read = (_NONE, self.param_specs.kv_scales, _PER_INSTANCE)
    slab = (POOL_SPECS.kv, POOL_SPECS.tag, TABLE_SPECS)
    specs = (_STATES, _NONE, _QUERIES, *read, *slab)
    return self._jit(body, specs, (_STATES, _NONE))

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

    specs = (self._layer_specs, _NONE, _PER_INSTANCE, _STATES, _NONE, _NONE)
    return self._jit(body, specs, (_NONE, _NONE))

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

    specs = (self.param_specs.weights, _NONE, _PER_INSTANCE, _NONE)
    return self._jit(body, specs, StepOutput(_PER_INSTANCE, _PER_INSTANCE))

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
