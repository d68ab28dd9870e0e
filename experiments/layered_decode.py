"""Decoding one request whose context is larger than all HBM.

All instances compute the same tokens, each attends the rBlocks that it holds in
either tier, and their states merge. While all lies in HBM, a step is one
program; else it goes through the model layer by layer, so that host memory can
stream one layer while the one before is computed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.attention.host_attention import staged_attention
from infinite_llm.cache.device_memory import free_bytes
from infinite_llm.cache.global_arrays import place
from infinite_llm.cache.host_slabs import TABLE_SPECS, HostSlabs
from infinite_llm.cache.kv_pool import POOL_SPECS
from infinite_llm.errors import ConfigError
from infinite_llm.models import rope
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.transformer import pool_kv_heads
from infinite_llm.types import INSTANCE_AXIS, TENSOR_AXIS
from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.attention_state import AttentionState, merge_many
from pallas_kernels.micro_attention.api import BlockTables

_NONE = PartitionSpec()
_PER_INSTANCE = PartitionSpec(INSTANCE_AXIS)
_QUERIES = PartitionSpec(None, TENSOR_AXIS)
_STATES = AttentionState(*[PartitionSpec(INSTANCE_AXIS, None, TENSOR_AXIS)] * 2)
_ONE = np.asarray([0, 1], np.int32)

Entry = tuple[int, int]
"""An rBlock of a pool, and its number in the request."""


class LayeredDecode:
  """One request over the pools and the host memory of all instances.

  The mesh may span several processes; all of them then call the same.

  Attributes:
    kv: `[I * N, L, 2, K, P, D]` pools of all instances.
    slabs: What lies in host memory.
  """

  def __init__(
    self,
    model: LoadedModel,
    *,
    block_size: int,
    num_blocks: int,
    slab_blocks: int,
    kv_dtype: str,
    most_staged: int = 2,
  ):
    """Allocates the pools.

    Args:
      model: Parameters on a mesh.
      block_size: P.
      num_blocks: N, rBlocks of each instance in HBM.
      slab_blocks: S, rBlocks of a slab on each instance.
      kv_dtype: Of keys and values.
      most_staged: Parts of slabs in HBM at once.

    Raises:
      ConfigError: If the model has sliding windows, or the pools do not fit.
    """
    config = model.config
    if config.sliding_window is not None:
      raise ConfigError(
        f"sliding_window must be None; got {config.sliding_window}."
      )
    self._model = model
    self._mesh = mesh = model.mesh
    self._block_size = block_size
    self._num_blocks = num_blocks
    self._most_staged = most_staged
    num_instances, ranks = mesh.devices.shape
    shape = (
      num_instances * num_blocks,
      config.num_layers,
      2,
      pool_kv_heads(config, ranks),
      block_size,
      config.head_dim,
    )
    block_bytes = math.prod(shape[1:]) * jnp.dtype(kv_dtype).itemsize
    device_bytes = num_blocks * block_bytes // ranks
    free = free_bytes(mesh.local_devices)
    if free is not None and device_bytes > free:
      raise ConfigError(
        f"num_blocks must fit on the devices; got {num_blocks}, which takes"
        f" {device_bytes} bytes of each, more than is free ({free}). Of GPUs"
        " JAX takes the part that XLA_PYTHON_CLIENT_MEM_FRACTION says."
      )
    self.kv = jax.jit(
      lambda: jnp.zeros(shape, kv_dtype),
      out_shardings=NamedSharding(mesh, POOL_SPECS.kv),
    )()
    self.in_hbm = [[] for _ in range(num_instances)]
    self.slabs = HostSlabs(mesh, slab_blocks)
    self._layers = [model.state["layers"][i] for i in range(config.num_layers)]
    self._build()

  @property
  def in_hbm(self) -> list[list[Entry]]:
    """What each instance holds in HBM, by rising logical number.

    To be set as a whole: tables are placed then, not at each step.
    """
    return self._in_hbm

  @in_hbm.setter
  def in_hbm(self, in_hbm: Sequence[Sequence[Entry]]) -> None:
    self._in_hbm = [list(mine) for mine in in_hbm]
    self._tables = self._place_tables()

  def spill(self, counts: Sequence[int]) -> None:
    """Moves each instance's oldest rBlocks to host memory as one slab.

    Args:
      counts: How many of each instance; they must be full.
    """
    gone = [
      mine[:count] for mine, count in zip(self.in_hbm, counts, strict=True)
    ]
    self.slabs.push(
      self.kv,
      [[block for block, _ in part] for part in gone],
      [[logical for _, logical in part] for part in gone],
    )
    self.in_hbm = [
      mine[count:] for mine, count in zip(self.in_hbm, counts, strict=True)
    ]

  def step(self, token: int, position: int) -> jax.Array:
    """Computes one token; its rBlock is already in `in_hbm`.

    Args:
      token: Its id.
      position: Its position, one more than that of the one before.

    Returns:
      `[1, V]` float32 logits of the next one, still being computed.
    """
    tables = self._tables
    append = self._append_block(position // self._block_size)
    positions = np.asarray([position], np.int32)
    offset = np.asarray([position % self._block_size], np.int32)
    if not self.slabs.slabs:
      tokens = np.asarray([token], np.int32)
      self.kv, logits = self._whole(
        self._model.state, tokens, positions, self.kv, append, offset, tables
      )
      return logits
    stream = self.slabs.stream(self._most_staged)
    x = self._embed(self._model.state, np.asarray([token], np.int32))
    for layer, params in enumerate(self._layers):
      self.kv, q, state = self._front(
        params,
        x,
        positions,
        self.kv,
        np.asarray(layer, np.int32),
        append,
        offset,
        tables,
      )
      for slab in self.slabs.slabs:
        (part,) = stream.take()
        state = self._add(state, q, positions, part, slab.tables)
        del part  # Its room is that of what comes next.
        stream.used(state)
      x = self._back(params, x, positions, state)
    return self._head(self._model.state, x)

  def _place_tables(self) -> BlockTables:
    """Tables over HBM: `[I * N]` entries, a row for each instance."""
    entries = np.zeros((2, len(self.in_hbm), self._num_blocks), np.int32)
    for instance, mine in enumerate(self.in_hbm):
      if mine:
        entries[:, instance, : len(mine)] = np.asarray(mine, np.int32).T
    tables = BlockTables(
      block_ids=entries[0].reshape(-1),
      logical_ids=entries[1].reshape(-1),
      starts=np.zeros(len(self.in_hbm), np.int32),
      counts=np.asarray([len(mine) for mine in self.in_hbm], np.int32),
    )
    return place(tables, NamedSharding(self._mesh, _PER_INSTANCE))

  def _append_block(self, logical_id: int) -> jax.Array:
    """`[I]` the rBlock that takes the token; the null block of the others."""
    blocks = [
      mine[-1][0] if mine and mine[-1][1] == logical_id else 0
      for mine in self.in_hbm
    ]
    return place(
      np.asarray(blocks, np.int32), NamedSharding(self._mesh, _PER_INSTANCE)
    )

  def _build(self) -> None:
    """Builds the programs: each layer uses the same ones."""
    model, config = self._model, self._model.config
    layers = nnx.merge(model.graphdef, model.state).layers
    layer_def, _ = nnx.split(layers[0])
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, model.state)
    layer_specs = specs["layers"][0]
    window = Window(config.head_dim**-0.5, None, 1)

    def rotation(positions):
      radians = rope.frequencies(config.rope, config.head_dim)
      return rope.rotation(positions, radians)

    def whole(params, tokens, positions, kv, append, offset, tables):
      module = nnx.merge(model.graphdef, params)

      def attend(layer, q, k, v, kv):
        kv = append_kv(kv, layer, k, v, append, offset)
        state = local_attention(q, _ONE, positions, kv, layer, tables, window)
        parts = jax.lax.all_gather(state, INSTANCE_AXIS)
        return merge_many(parts).out.astype(q.dtype), kv

      hidden, kv = module(tokens, positions, kv, attend)
      return kv, module.logits(hidden)

    def embed(params, tokens):
      module = nnx.merge(model.graphdef, params)
      return module.embed_tokens.embed(tokens, TENSOR_AXIS)

    def front(params, x, positions, kv, layer, append, offset, tables):
      module = nnx.merge(layer_def, params)
      kept = []

      def attend(q, k, v, kv):
        kv = append_kv(kv, layer, k, v, append, offset)
        state = local_attention(q, _ONE, positions, kv, layer, tables, window)
        kept.append((q, state))
        return jnp.zeros_like(q), kv  # What follows is computed by `back`.

      _, kv = module.self_attn(
        module.input_layernorm(x), rotation(positions), kv, attend, TENSOR_AXIS
      )
      ((q, state),) = kept
      return kv, q, jax.tree.map(lambda leaf: leaf[None], state)

    def add(state, q, positions, staged, tables):
      state = jax.tree.map(lambda leaf: leaf[0], state)
      state = staged_attention(
        state, q, _ONE, positions, staged, tables, window
      )
      return jax.tree.map(lambda leaf: leaf[None], state)

    def back(params, x, positions, state):
      parts = jax.lax.all_gather(state, INSTANCE_AXIS, tiled=True)
      out = merge_many(parts).out

      def attend(q, k, v, cache):
        return out.astype(q.dtype), cache

      module = nnx.merge(layer_def, params)
      x, _ = module(x, rotation(positions), None, attend, TENSOR_AXIS)
      return x

    def head(params, x):
      module = nnx.merge(model.graphdef, params)
      return module.logits(module.norm(x))

    kv = POOL_SPECS.kv
    self._whole = self._jit(
      whole,
      (specs, _NONE, _NONE, kv, _PER_INSTANCE, _NONE, TABLE_SPECS),
      (kv, _NONE),
      donate=(3,),
    )
    self._embed = self._jit(embed, (specs, _NONE), _NONE)
    self._front = self._jit(
      front,
      (layer_specs, _NONE, _NONE, kv, _NONE, _PER_INSTANCE, _NONE, TABLE_SPECS),
      (kv, _QUERIES, _STATES),
      donate=(3,),
    )
    self._add = self._jit(
      add, (_STATES, _QUERIES, _NONE, kv, TABLE_SPECS), _STATES
    )
    self._back = self._jit(back, (layer_specs, _NONE, _NONE, _STATES), _NONE)
    self._head = self._jit(head, (specs, _NONE), _NONE)

  def _jit(
    self,
    body: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    donate: tuple[int, ...] = (),
  ) -> Callable[..., Any]:
    return jax.jit(
      jax.shard_map(
        body,
        mesh=self._mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      ),
      donate_argnums=donate,
    )
