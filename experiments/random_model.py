"""A model with random weights, for benches that need its shape only."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding

from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.types import TENSOR_AXIS

_SIZES = (
  "vocab_size",
  "model_dim",
  "mlp_dim",
  "num_layers",
  "num_q_heads",
  "num_kv_heads",
  "head_dim",
)


def random_model(
  config: ml_collections.ConfigDict, mesh: Mesh, seed: int
) -> LoadedModel:
  """Draws weights on their devices.

  Args:
    config: Sizes, as fields of `ModelConfig`, and the `dtype`.
    mesh: ("instance", "tensor") mesh.
    seed: Of the weights.
  """
  shape = ModelConfig(**{name: config[name] for name in _SIZES})
  graphdef, abstract = abstract_transformer(
    shape, dtype=config.dtype, tensor_axis=TENSOR_AXIS
  )
  keys = map(jax.random.key, itertools.count(seed))
  state = jax.tree.map(
    lambda leaf, spec: _draw(leaf.shape, leaf.dtype, NamedSharding(mesh, spec))(
      next(keys)
    ),
    abstract,
    param_specs(shape, mesh),
  )
  return LoadedModel(
    config=shape,
    graphdef=graphdef,
    state=state,
    mesh=mesh,
  )


@functools.cache
def _draw(shape: tuple[int, ...], dtype: str, sharding: NamedSharding):
  """Weights of one shape; equal ones share a program."""
  return jax.jit(
    lambda key: 0.02 * jax.random.normal(key, shape, jnp.dtype(dtype)),
    out_shardings=sharding,
  )
