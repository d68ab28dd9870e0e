"""The decoder. It knows nothing of rBlocks: attention is the caller's.

One module serves dense use and `jax.shard_map`. In the latter its parameters
are the local shards of one tensor rank, and `tensor_axis` names the mesh axis
that its row-parallel projections sum over.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from infinite_llm.errors import ConfigError
from infinite_llm.models import rope
from infinite_llm.models.layers import Attention, Embedding, GatedMlp, RMSNorm
from infinite_llm.models.registry import ModelConfig
from infinite_llm.types import TENSOR_AXIS


class Attend(Protocol):
  """Attention of one layer, with whatever cache the caller keeps."""

  def __call__(
    self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any
  ) -> tuple[jax.Array, Any]:
    """Stores keys and values, attends, and returns the output and the cache.

    Args:
      layer: Which layer asks, a Python int.
      q: `[T, H, D]` rotated queries of this tensor rank.
      k: `[T, K, D]` rotated keys.
      v: `[T, K, D]` values.
      cache: What the previous layer's call returned.

    Returns:
      `[T, H, D]` and the cache for the next layer.
    """
    ...


class DecoderLayer(nnx.Module):
  """Attention and MLP, each behind a norm and beside the residual stream."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    def norm():
      return RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)

    self.input_layernorm = norm()
    self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
    self.post_attention_layernorm = norm()
    self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    cache: Any,
    attend: Callable[..., tuple[jax.Array, Any]],
    tensor_axis: str | None,
  ) -> tuple[jax.Array, Any]:
    """Maps `[T, model_dim]` to the same; see `Attention` for the arguments."""
    attended, cache = self.self_attn(
      self.input_layernorm(x), rotation, cache, attend, tensor_axis
    )
    x = x + attended
    return x + self.mlp(self.post_attention_layernorm(x), tensor_axis), cache


class Transformer(nnx.Module):
  """A decoder-only transformer with pluggable attention."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    tensor_axis: str | None = None,
  ):
    """Builds the module with random weights, whole and unsharded.

    Loaders call this under `nnx.eval_shape`, where nothing is allocated.

    Args:
      config: Shape of the model.
      dtype: Dtype of weights and activations.
      rngs: Source of the random weights.
      tensor_axis: Mesh axis of tensor parallelism; None runs no collective.
    """
    self.config = config
    self.tensor_axis = tensor_axis

    def embedding():
      return Embedding(
        config.vocab_size, config.model_dim, dtype=dtype, rngs=rngs
      )

    self.embed_tokens = embedding()
    self.layers = nnx.List(
      DecoderLayer(config, dtype=dtype, rngs=rngs)
      for _ in range(config.num_layers)
    )
    self.norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)
    self.lm_head = None if config.tie_embeddings else embedding()

  def __call__(
    self, tokens: jax.Array, positions: jax.Array, cache: Any, attend: Attend
  ) -> tuple[jax.Array, Any]:
    """Runs all layers over tokens of any number of sequences.

    *Collective over axis* `tensor_axis`.

    Args:
      tokens: `[T]` int32 in `[0, V)`.
      positions: `[T]` int32, of any size; -1 marks padding rows, whose output
        is finite but means nothing.
      cache: Threaded through `attend` from layer to layer.
      attend: Attention of each layer.

    Returns:
      `[T, model_dim]` normalised hidden states in the weights' dtype, and the
      cache.
    """
    x = self.embed_tokens.embed(tokens, self.tensor_axis)
    radians = rope.frequencies(self.config.rope, self.config.head_dim)
    rotation = rope.rotation(positions, radians)
    for index, layer in enumerate(self.layers):
      attend_here = functools.partial(attend, index)
      x, cache = layer(x, rotation, cache, attend_here, self.tensor_axis)
    return self.norm(x), cache

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Scores the whole vocabulary.

    *Collective over axis* `tensor_axis` where the vocabulary is sharded.

    Args:
      hidden: `[R, model_dim]` rows that `__call__` returned.

    Returns:
      `[R, V]` float32, the same on every tensor rank.
    """
    head = self.embed_tokens if self.lm_head is None else self.lm_head
    return head.logits(hidden, self.tensor_axis)


def abstract_transformer(
  config: ModelConfig, *, dtype: DTypeLike, tensor_axis: str | None
) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """Describes a model without allocating its weights.

  Args:
    config: Shape of the model.
    dtype: Dtype of the weights.
    tensor_axis: See `Transformer`.

  Returns:
    The static part, hashable, and the state as a nested dict with a
    `jax.ShapeDtypeStruct` for each whole weight. `nnx.merge` joins them.
  """
  model = nnx.eval_shape(
    lambda: Transformer(
      config, dtype=dtype, rngs=nnx.Rngs(0), tensor_axis=tensor_axis
    )
  )
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


_COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_KV_PROJECTIONS = ("k_proj", "v_proj")
_ROW_PARALLEL = ("o_proj", "down_proj")
_VOCABULARY = ("embed_tokens", "lm_head")


def pool_kv_heads(config: ModelConfig, ranks: int) -> int:
  """KV heads that the pools of an instance's ranks hold, copies included.

  Args:
    config: Shape of the model.
    ranks: Tensor ranks of the instance.

  Returns:
    K; where ranks outnumber the heads, one for each rank.
  """
  return max(config.num_kv_heads, ranks)


def param_specs(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
  """Says how each weight lies on a mesh.

  Heads and the inner MLP dimension are sharded over "tensor", the vocabulary
  too where the ranks divide it; nothing is sharded over "instance". Where there
  are more ranks than KV heads, each rank holds all KV projections and uses one
  head of them, the same as its neighbours'.

  Args:
    config: Shape of the model.
    mesh: A mesh from `make_mesh`.

  Returns:
    A tree like the model's state with a `PartitionSpec` for each weight, for
    use as `in_specs` of `jax.shard_map`.

  Raises:
    ConfigError: If the ranks divide the heads or the MLP unevenly.
  """
  ranks = mesh.shape[TENSOR_AXIS]
  for name in ("num_q_heads", "mlp_dim"):
    size = getattr(config, name)
    if size % ranks:
      raise ConfigError(
        f"{name} must be a multiple of tensor_parallel ({ranks}); got {size}."
      )
  is_replicated = ranks > config.num_kv_heads
  if pool_kv_heads(config, ranks) % min(ranks, config.num_kv_heads):
    raise ConfigError(
      "num_kv_heads must be a multiple or a divisor of tensor_parallel"
      f" ({ranks}); got {config.num_kv_heads}."
    )

  def spec(path, weight) -> PartitionSpec:
    owner = path[-2].key
    if is_replicated and owner in _KV_PROJECTIONS:
      return PartitionSpec()
    if owner in _COLUMN_PARALLEL:
      return PartitionSpec(TENSOR_AXIS, *[None] * (len(weight.shape) - 1))
    if owner in _ROW_PARALLEL and len(weight.shape) == 2:
      return PartitionSpec(None, TENSOR_AXIS)
    if owner in _VOCABULARY and config.vocab_size % ranks == 0:
      return PartitionSpec(TENSOR_AXIS, None)
    return PartitionSpec()

  _, state = abstract_transformer(config, dtype=jnp.float32, tensor_axis=None)
  return jax.tree_util.tree_map_with_path(spec, state)
