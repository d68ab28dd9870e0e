import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import ConfigError
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import (
  Transformer,
  abstract_transformer,
  param_specs,
  pool_kv_heads,
)
from tests import testing
from tests.tolerances import tolerance

CONFIG = ModelConfig(
  vocab_size=37,
  model_dim=32,
  mlp_dim=48,
  num_layers=2,
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=8,
)


def _recording_attend(calls):
  """Notes each call, and gives zeros."""

  def attend(layer, q, k, v, cache):
    calls.append((layer, q.shape, k.shape, v.shape, q.dtype.name, cache))
    return jnp.zeros_like(q), cache + 1

  return attend


def test_attend_is_called_once_a_layer_with_the_cache_of_the_last_call():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  calls = []

  hidden, cache = model(
    jnp.arange(5), jnp.arange(5), 0, _recording_attend(calls)
  )

  shapes = ((5, 4, 8), (5, 2, 8), (5, 2, 8))
  assert calls == [(0, *shapes, "float32", 0), (1, *shapes, "float32", 1)]
  assert cache == 2
  assert hidden.shape == (5, 32)


def test_bfloat16_models_compute_in_bfloat16_and_score_in_float32():
  model = Transformer(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  calls = []

  hidden, _ = model(jnp.arange(5), jnp.arange(5), 0, _recording_attend(calls))

  assert calls[0][4] == "bfloat16"
  assert hidden.dtype == jnp.bfloat16
  assert model.logits(hidden).dtype == jnp.float32


@pytest.mark.parametrize("vocab_size", [36, 37])
@pytest.mark.parametrize(
  # Four ranks outnumber the two KV heads.
  ("tie_embeddings", "ranks"),
  [(False, 2), (True, 2), (True, 4)],
)
def test_tensor_ranks_compute_what_one_device_does(
  vocab_size, tie_embeddings, ranks
):
  # Everything that a shard may hold a part of; 37 tokens cannot be sharded.
  config = dataclasses.replace(
    CONFIG,
    vocab_size=vocab_size,
    tie_embeddings=tie_embeddings,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
  )
  mesh = make_mesh(1, ranks)
  graphdef, abstract = abstract_transformer(
    config, dtype="float32", tensor_axis="tensor"
  )
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)),
    abstract,
  )
  tokens = rng.integers(0, vocab_size, 9)

  def run(state, tokens):
    return testing.dense_logits(nnx.merge(graphdef, state), tokens)

  sharded = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(param_specs(config, mesh), PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  )(state, tokens)

  dense = nnx.merge(graphdef, state)
  dense.tensor_axis = None
  np.testing.assert_allclose(
    sharded,
    testing.dense_logits(dense, tokens),
    rtol=0,
    atol=tolerance("float32").logits,
  )


def test_head_counts_inside_shard_map_are_the_ranks_own():
  mesh = make_mesh(1, 2)
  graphdef, _ = abstract_transformer(
    CONFIG, dtype="float32", tensor_axis="tensor"
  )
  _, state = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
  calls = []

  def run(state, tokens):
    model = nnx.merge(graphdef, state)
    hidden, _ = model(tokens, tokens, 0, _recording_attend(calls))
    return model.logits(hidden)

  jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(param_specs(CONFIG, mesh), PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  )(nnx.to_pure_dict(state), jnp.arange(5))

  assert calls[0][1:4] == ((5, 2, 8), (5, 1, 8), (5, 1, 8))


def test_positions_of_other_sequences_and_padding_do_not_matter():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  tokens = jnp.array([3, 1, 4, 1, 5])
  positions = jnp.array([0, 1, 2, 3, -1])

  def attend_to_self(layer, q, k, v, cache):
    return jnp.repeat(v, 2, axis=1), cache

  hidden, _ = model(tokens, positions, None, attend_to_self)
  alone, _ = model(tokens[2:3], positions[2:3], None, attend_to_self)

  np.testing.assert_allclose(hidden[2:3], alone, atol=1e-6)
  assert np.isfinite(hidden).all()


def test_answers_depend_on_relative_positions_only_even_far_out():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  tokens = np.arange(20) % CONFIG.vocab_size

  near = testing.dense_logits(model, tokens)
  far = testing.dense_logits(model, tokens, jnp.arange(20) + 4_000_000)

  np.testing.assert_allclose(
    far, near, rtol=0, atol=tolerance("float32").logits
  )


def test_an_abstract_model_allocates_nothing_and_matches_a_real_one():
  graphdef, abstract = abstract_transformer(
    CONFIG, dtype=jnp.bfloat16, tensor_axis=None
  )
  real_graphdef, real = nnx.split(
    Transformer(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  )

  leaves = jax.tree.leaves(abstract)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert graphdef == real_graphdef
  assert hash(graphdef) == hash(real_graphdef)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype), (b.shape, b.dtype)
    ),
    abstract,
    nnx.to_pure_dict(real),
  )


@pytest.mark.parametrize(
  ("heads", "ranks", "message"),
  [
    ((4, 2), 3, r"num_q_heads must be a multiple of .* \(3\); got 4\."),
    ((6, 2), 3, r"num_kv_heads must be .* or a divisor of .* \(3\); got 2\."),
    ((12, 3), 2, r"num_kv_heads must be a multiple or .* \(2\); got 3\."),
  ],
)
def test_meshes_that_split_heads_unevenly_are_refused(heads, ranks, message):
  num_q_heads, num_kv_heads = heads
  config = dataclasses.replace(
    CONFIG, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads
  )
  with pytest.raises(ConfigError, match=message):
    param_specs(config, make_mesh(1, ranks))


def test_pools_hold_a_head_for_each_rank_beyond_the_kv_heads():
  assert [pool_kv_heads(CONFIG, ranks) for ranks in (1, 2, 4)] == [2, 2, 4]
