"""Builders that tests share."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import Attend, Transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"


def dense_attend(config: ModelConfig, positions: jax.Array) -> Attend:
  """Attention of one sequence without a cache: the oracle of all others.

  Args:
    config: Gives each layer's window.
    positions: `[T]` int32, of the tokens that the model is called with.

  Returns:
    An `attend` callback. A query sees the keys of the same call at its own and
    earlier positions, within its layer's window; the cache passes unchanged.
  """

  def attend(layer, q, k, v, cache):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    visible = positions[None, :] <= positions[:, None]
    window = config.layer_window(layer)
    if window is not None:
      visible &= positions[None, :] > positions[:, None] - window
    scores = jnp.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v), cache

  return attend


def dense_logits(model: Transformer, tokens, positions=None) -> jax.Array:
  """Runs a whole sequence densely, without any cache.

  Args:
    model: The model, whole or as a shard inside `jax.shard_map`.
    tokens: `[T]` int32.
    positions: `[T]` int32; None counts from 0.

  Returns:
    `[T, V]` float32.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  if positions is None:
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  attend = dense_attend(model.config, positions)
  hidden, _ = model(tokens, positions, None, attend)
  return model.logits(hidden)


def dense_greedy(model: Transformer, prompt, count: int) -> list[int]:
  """Continues a prompt greedily, recomputing it whole for each token.

  Args:
    model: The whole model.
    prompt: `[T]` token ids.
    count: Tokens to add.

  Returns:
    The `count` tokens that follow.
  """
  # One compilation: causality keeps the padding behind the end invisible.
  tokens = np.zeros(len(prompt) + count, np.int32)
  tokens[: len(prompt)] = prompt
  step = jax.jit(lambda t, row: jnp.argmax(dense_logits(model, t)[row]))
  for row in range(len(prompt) - 1, len(tokens) - 1):
    tokens[row + 1] = step(tokens, row)
  return tokens[len(prompt) :].tolist()
