"""Random weights, for those to whom only the shape of a model matters."""

import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from infinite_llm.errors import CheckpointError
from infinite_llm.models.hf_generation import read_generation, read_tokenizer
from infinite_llm.models.loaded_model import LoadedModel, resolve_dtype
from infinite_llm.models.model_files import read_json
from infinite_llm.models.registry import ModelConfig, from_hf
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.types import TENSOR_AXIS

_STANDARD_DEVIATION = 0.02
# What a dtype in `config.json` is computed with.
_DTYPE_OF = {
  "float32": "float32",
  "bfloat16": "bfloat16",
  "float16": "bfloat16",
}


def load_dummy(
  path: str | pathlib.Path,
  mesh: Mesh,
  *,
  seed: int,
  dtype: DTypeLike | None = None,
) -> LoadedModel:
  """Draws a model of the shape that a Hugging Face folder describes.

  Weight files are not looked at. Whatever else the folder has is read as
  `load_hf` does.

  *Collective over all processes* of the mesh: each calls this.

  Args:
    path: Folder with `config.json`.
    mesh: A mesh from `make_mesh`.
    seed: Of the weights; they do not depend on the mesh.
    dtype: "float32" or "bfloat16"; None takes what `config.json` names, with
      bfloat16 for float16 and where it names none.

  Returns:
    The model.

  Raises:
    CheckpointError: If `config.json` is missing or unreadable, or the
      architecture is not implemented.
    ConfigError: If the dtype is neither, or the mesh cannot shard this model.
  """
  folder = pathlib.Path(path)
  hf_config = read_json(folder / "config.json")
  config = from_hf(hf_config)
  tokenizer = read_tokenizer(folder)
  return draw_model(
    config,
    mesh,
    seed=seed,
    dtype=_named_dtype(hf_config) if dtype is None else dtype,
    tokenizer=tokenizer,
    generation=read_generation(folder, hf_config, tokenizer),
  )


def draw_model(
  config: ModelConfig, mesh: Mesh, *, seed: int, dtype: DTypeLike, **more: Any
) -> LoadedModel:
  """Draws weights on their devices, each device its own shards only.

  *Collective over all processes* of the mesh: each calls this.

  Args:
    config: Shape of the model.
    mesh: A mesh from `make_mesh`.
    seed: Of the weights; they do not depend on the mesh.
    dtype: "float32" or "bfloat16".
    **more: Other fields of the result.

  Returns:
    The model, sharded over "tensor" and replicated over "instance".

  Raises:
    ConfigError: If the dtype is neither, or the mesh cannot shard this model.
  """
  graphdef, abstract = abstract_transformer(
    config, dtype=resolve_dtype(dtype), tensor_axis=TENSOR_AXIS
  )
  numbers = itertools.count()

  def draw(leaf: jax.ShapeDtypeStruct, spec: jax.sharding.PartitionSpec):
    program = _program(leaf.shape, leaf.dtype.name, NamedSharding(mesh, spec))
    # Plain numbers are alike in all processes, so JAX replicates them.
    return program(np.uint32(seed), np.uint32(next(numbers)))

  state = jax.tree.map(draw, abstract, param_specs(config, mesh))
  return LoadedModel(
    config=config, graphdef=graphdef, state=state, mesh=mesh, **more
  )


@functools.cache
def _program(shape: tuple[int, ...], dtype: str, sharding: NamedSharding):
  """Draws a weight of one shape; equal ones share a program."""

  def draw(seed: jax.Array, number: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    return _STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.dtype(dtype))

  return jax.jit(draw, out_shardings=sharding)


def _named_dtype(hf_config: Mapping[str, Any]) -> str:
  """The dtype that `config.json` names; old and new `transformers` differ."""
  name = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
  if not isinstance(name, str) or name not in _DTYPE_OF:
    raise CheckpointError(
      f"config.json: dtype must be one of {', '.join(_DTYPE_OF)}; got {name!r}."
    )
  return _DTYPE_OF[name]
