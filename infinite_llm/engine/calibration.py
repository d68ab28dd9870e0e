"""Finds scales of keys and values by what sample prompts make of them."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.cache.rows import split_rows
from infinite_llm.distributed.mesh import own_instances, row_mesh
from infinite_llm.engine.admission import as_token_ids
from infinite_llm.errors import ModelError, RequestError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.transformer import pool_kv_heads
from infinite_llm.types import TENSOR_AXIS
from pallas_kernels.micro_attention.api import BlockTables

_BLOCK_SIZE = 64
_SMALLEST_BUCKET = 256
_LARGEST_NUMBER = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448
_SMALLEST_SCALE = 1.2e-38  # What is smaller is not normal in float32.
_SCALE_SPEC = PartitionSpec(None, None, TENSOR_AXIS)
_NONE = PartitionSpec()


def calibrate_kv_scales(
  model: LoadedModel, prompts: Iterable[str | Sequence[int]]
) -> np.ndarray:
  """Finds scales with which the keys and values of some prompts fit in float8.

  Runs the prompts, one after another and each in one piece, on one instance,
  with keys and values as the model has them. The largest of each KV head, by
  layer and over all tokens, becomes 448, the largest number of float8_e4m3fn;
  what is larger in later requests becomes that too. *Blocks the host.*

  Args:
    model: A model on its mesh, as `load_hf` gives it, or an `LLM` has it.
    prompts: Texts or token ids, as requests will bring them.

  Returns:
    `[L, 2, K]` float32: for each layer, keys and values of each KV head. An
    `LLM` takes it as `kv_scales`, or the file that `numpy.save` makes of it.

  Raises:
    RequestError: If there is no prompt, or one is empty, is no text and no
      token ids of the model, or is a text and there is no tokenizer.
    ModelError: If a key or value is not finite.
  """
  batch = [_tokens(model, prompt) for prompt in prompts]
  if not batch:
    raise RequestError("prompts must have at least one prompt; got none.")
  row = row_mesh(model.mesh, own_instances(model.mesh)[0])
  specs = jax.tree.map(lambda leaf: leaf.sharding.spec, model.state)
  weights = jax.tree.map(
    lambda leaf, spec: split_rows(leaf, [row], spec)[0], model.state, specs
  )
  ranks = row.shape[TENSOR_AXIS]
  num_heads = pool_kv_heads(model.config, ranks)
  largest = jax.device_put(
    np.zeros((model.config.num_layers, 2, num_heads), np.float32),
    NamedSharding(row, _SCALE_SPEC),
  )
  observe = jax.jit(
    jax.shard_map(
      functools.partial(_observe, model),
      mesh=row,
      in_specs=(specs, _NONE, _NONE, _SCALE_SPEC),
      out_specs=_SCALE_SPEC,
      check_vma=False,
    )
  )
  for tokens in batch:
    bucket = _bucket(len(tokens))
    padded = np.zeros(bucket, np.int32)
    padded[: len(tokens)] = tokens
    largest = observe(weights, padded, np.int32(len(tokens)), largest)
  # Where ranks outnumber KV heads, some have the same one.
  found = np.asarray(largest)[:, :, :: num_heads // model.config.num_kv_heads]
  if not np.isfinite(found).all():
    layer = int(np.argwhere(~np.isfinite(found))[0, 0])
    raise ModelError(f"A key or value of layer {layer} is not finite.")
  scales = np.maximum(found / _LARGEST_NUMBER, _SMALLEST_SCALE)
  return np.where(found > 0, scales, 1.0).astype(np.float32)


def _tokens(model: LoadedModel, prompt: str | Sequence[int]) -> tuple[int, ...]:
  """Token ids of a prompt, checked."""
  if isinstance(prompt, str):
    if model.tokenizer is None:
      raise RequestError(
        "The checkpoint has no tokenizer.json: give token ids, not text."
      )
    prompt = model.tokenizer.encode(prompt).ids
  tokens = as_token_ids(prompt)
  if not tokens:
    raise RequestError("prompts must each have at least one token; got none.")
  for token in (min(tokens), max(tokens)):
    if not 0 <= token < model.config.vocab_size:
      raise RequestError(
        f"prompt token ids must be in [0, {model.config.vocab_size}); got"
        f" {token}."
      )
  return tokens


def _bucket(num_tokens: int) -> int:
  """Few lengths, so that few programs are compiled."""
  bucket = _SMALLEST_BUCKET
  while bucket < num_tokens:
    bucket *= 2
  return bucket


def _observe(
  model: LoadedModel,
  weights: Any,
  tokens: jax.Array,
  count: jax.Array,
  largest: jax.Array,
) -> jax.Array:
  """Updates the largest keys and values by those of one prompt.

  Args:
    model: Which model; its weights are not read.
    weights: Its state on one tensor rank.
    tokens: `[T]` int32.
    count: `[]` int32 how many of them are the prompt's.
    largest: `[L, 2, K]` float32 largest magnitudes so far.

  Returns:
    `[L, 2, K]` float32.
  """
  num_tokens = tokens.shape[0]
  positions = jnp.arange(num_tokens, dtype=jnp.int32)
  positions = jnp.where(positions < count, positions, -1)
  logical_ids = jnp.arange(num_tokens // _BLOCK_SIZE, dtype=jnp.int32)
  tables = BlockTables(
    block_ids=1 + logical_ids,
    logical_ids=logical_ids,
    starts=jnp.zeros(1, jnp.int32),
    counts=jnp.full(1, logical_ids.shape[0], jnp.int32),
  )
  whole = jnp.asarray([0, num_tokens], jnp.int32)

  def attend(layer, q, k, v, largest):
    kv = jnp.stack([k, v])  # [2, T, K, D]
    is_token = (positions >= 0)[:, None, None]
    # Not every maximum keeps NaN, but all keep infinity.
    sizes = jnp.where(jnp.isfinite(kv), jnp.abs(kv), jnp.inf)
    sizes = jnp.where(is_token, sizes.astype(jnp.float32), 0)
    largest = largest.at[layer].max(jnp.max(sizes, axis=(1, 3)))
    pool = kv.reshape(2, -1, _BLOCK_SIZE, *kv.shape[2:])
    pool = pool.transpose(1, 0, 3, 2, 4)  # [N, 2, K, P, D]
    pool = jnp.pad(pool, ((1, 0), *[(0, 0)] * 4))[:, None]  # A null block.
    window = Window(
      model.config.head_dim**-0.5, model.config.layer_window(layer), num_tokens
    )
    state = local_attention(q, whole, positions, pool, 0, tables, window)
    return state.out.astype(q.dtype), largest

  module = nnx.merge(model.graphdef, weights)
  _, largest = module(tokens, positions, largest, attend)
  return largest
