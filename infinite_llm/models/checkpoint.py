"""Own checkpoints, with Orbax: saved from any mesh, restored onto any other.

A folder holds `weights/`, written by Orbax, and `model.json`: configuration,
tokenizer, defaults for generation, and the size of each file of the weights.
`model.json` is written last, so a folder with it is complete, and a truncated
copy is found before anything is read.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp
from tokenizers import Tokenizer

from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models.loaded_model import (
  GenerationDefaults,
  LoadedModel,
  resolve_dtype,
)
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.rope import RopeConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.rules import require_kv_scales
from infinite_llm.types import TENSOR_AXIS

_FORMAT = "infinite-llm-1"
_WEIGHTS = "weights"
_MODEL_FILE = "model.json"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
  """Whether a folder is one that `save` finished writing."""
  return (pathlib.Path(path) / _MODEL_FILE).is_file()


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  state: Any,
  *,
  tokenizer: Tokenizer | None = None,
  generation: GenerationDefaults | None = None,
  kv_scales: np.ndarray | None = None,
) -> None:
  """Writes a model to a new folder, or over an incomplete one.

  *Blocks the host* until all is written. All processes of the mesh call this.

  Args:
    path: Folder to write.
    config: Shape of the model.
    state: Its weights, on any mesh.
    tokenizer: Its tokenizer, if it has one.
    generation: Its defaults for generation, if it has any.
    kv_scales: `[L, 2, K]` float32 scales of its keys and values in
      float8_e4m3fn, if it has any.

  Raises:
    CheckpointError: If the folder holds a complete checkpoint already.
  """
  path = pathlib.Path(path).absolute()
  # No process can see this file appear before all of them have looked for it.
  if (path / _MODEL_FILE).exists():
    raise CheckpointError(f"{path} exists already; nothing was saved.")
  ocp.save(path / _WEIGHTS, state, overwrite=True)
  if jax.process_index() != 0:
    return
  model = {
    "format": _FORMAT,
    "dtype": jax.tree.leaves(state)[0].dtype.name,
    "config": dataclasses.asdict(config),
    "tokenizer": None if tokenizer is None else tokenizer.to_str(),
    "generation": dataclasses.asdict(generation or GenerationDefaults()),
    "kv_scales": None if kv_scales is None else np.asarray(kv_scales).tolist(),
    "bytes": {
      str(file.relative_to(path)): file.stat().st_size
      for file in sorted((path / _WEIGHTS).rglob("*"))
      if file.is_file()
    },
  }
  text = json.dumps(model, indent=2) + "\n"
  (path / _MODEL_FILE).write_text(text, encoding="utf-8")


def restore(
  path: str | pathlib.Path, mesh: Mesh, *, dtype: DTypeLike | None = None
) -> LoadedModel:
  """Reads a model that `save` wrote onto any mesh.

  *Blocks the host* until all is read. All processes of the mesh call this.

  Args:
    path: Folder that `save` created.
    mesh: A mesh from `make_mesh`, of any shape that the model can be sharded
      over.
    dtype: Dtype to cast the weights to; None keeps the saved one.

  Returns:
    The model, sharded over "tensor" and replicated over "instance".

  Raises:
    CheckpointError: If the folder is no such checkpoint, a file of it is
      missing or damaged, or its weights do not fit its configuration.
    ConfigError: If `dtype` is not supported or the mesh cannot shard the model.
  """
  path = pathlib.Path(path).absolute()
  model = _read_model_file(path)
  config = _read_config(path, model)
  _check_files(path, model)
  dtype = resolve_dtype(model["dtype"] if dtype is None else dtype)
  graphdef, abstract = abstract_transformer(
    config, dtype=dtype, tensor_axis=TENSOR_AXIS
  )
  _check_tensors(path, abstract)
  on_mesh = jax.tree.map(
    lambda leaf, spec: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    ),
    abstract,
    param_specs(config, mesh),
  )
  try:
    state = ocp.load(path / _WEIGHTS, on_mesh)
  # Which exception a damaged file causes depends on the storage driver.
  except Exception as error:
    raise CheckpointError(f"{path}: weights are unreadable: {error}") from error
  tokenizer = model["tokenizer"]
  return LoadedModel(
    config=config,
    graphdef=graphdef,
    state=state,
    mesh=mesh,
    tokenizer=None if tokenizer is None else Tokenizer.from_str(tokenizer),
    generation=GenerationDefaults(**model["generation"]),
    kv_scales=_read_scales(path, model, config),
  )


def _by_name(tree: Any) -> dict[tuple[str, ...], Any]:
  """Leaves by path; the metadata spells the layers' numbers as text."""
  return {
    tuple(str(entry.key) for entry in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _read_model_file(path: pathlib.Path) -> Mapping[str, Any]:
  file = path / _MODEL_FILE
  if not file.is_file():
    raise CheckpointError(f"{file} does not exist.")
  try:
    model = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise CheckpointError(f"{file} is not readable JSON: {error}.") from error
  found = model.get("format") if isinstance(model, dict) else None
  if found != _FORMAT:
    raise CheckpointError(
      f"{file} must have format {_FORMAT!r}; found {found!r}."
    )
  return model


def _read_config(path: pathlib.Path, model: Mapping[str, Any]) -> ModelConfig:
  try:
    fields = dict(model["config"])
    return ModelConfig(**fields | {"rope": RopeConfig(**fields["rope"])})
  except (ConfigError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{path / _MODEL_FILE} holds a wrong configuration: {error}"
    ) from error


def _read_scales(
  path: pathlib.Path, model: Mapping[str, Any], config: ModelConfig
) -> np.ndarray | None:
  # Folders from before there were scales do not speak of them.
  if model.get("kv_scales") is None:
    return None
  shape = (config.num_layers, 2, config.num_kv_heads)
  try:
    scales = np.asarray(model["kv_scales"], np.float32)
    require_kv_scales("kv_scales", scales, shape)
  except (TypeError, ValueError) as error:
    raise CheckpointError(
      f"{path / _MODEL_FILE} holds wrong scales: {error}"
    ) from error
  return scales


def _check_files(path: pathlib.Path, model: Mapping[str, Any]) -> None:
  for name, expected in model["bytes"].items():
    file = path / name
    if not file.is_file():
      raise CheckpointError(f"{file} does not exist.")
    found = file.stat().st_size
    if found != expected:
      raise CheckpointError(
        f"{file} must have {expected} bytes; found {found}."
      )


def _check_tensors(path: pathlib.Path, abstract: Any) -> None:
  """Compares names and shapes, which Orbax would report less clearly."""
  expected = _by_name(abstract)
  saved = _by_name(ocp.metadata(path / _WEIGHTS).metadata)
  for name in sorted(expected.keys() - saved.keys()):
    raise CheckpointError(
      f"{path} lacks tensor {'.'.join(name)} of shape "
      f"{list(expected[name].shape)}."
    )
  for name in sorted(saved.keys() - expected.keys()):
    raise CheckpointError(
      f"{path} has tensor {'.'.join(name)}, which its configuration does not "
      "use."
    )
  for name, leaf in expected.items():
    found = list(saved[name].shape)
    if found != list(leaf.shape):
      raise CheckpointError(
        f"{path}: {'.'.join(name)} must have shape {list(leaf.shape)} as its "
        f"configuration says; found {found}."
      )
