"""Own checkpoints, with Orbax: saved from any mesh, restored onto any other.

A folder holds `weights/`, written by Orbax, and `model.json`: configuration,
tokenizer, defaults for generation, and the size of each file of the weights.
`model.json` is written last, so a folder with it is complete, and a truncated
copy is found before anything is read.
"""

import contextlib
import dataclasses
import json
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp
from tokenizers import Tokenizer

from infinite_llm.errors import CheckpointError
from infinite_llm.models.loaded_model import (
  GenerationDefaults,
  LoadedModel,
  resolve_dtype,
)
from infinite_llm.models.model_files import read_json
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.rope import RopeConfig
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.rules import require_kv_scales
from infinite_llm.sampling_params import SamplingParams
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
      missing, unreadable or of another size, or its weights do not fit its
      configuration.
    ConfigError: If `dtype` is not supported or the mesh cannot shard the model.
  """
  path = pathlib.Path(path).absolute()
  saved = _read_model_file(path)
  config = saved.config
  _check_files(path, saved.sizes)
  dtype = saved.dtype if dtype is None else resolve_dtype(dtype)
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
  with _reading(path):
    state = ocp.load(path / _WEIGHTS, on_mesh)
  return LoadedModel(
    config=config,
    graphdef=graphdef,
    state=state,
    mesh=mesh,
    tokenizer=saved.tokenizer,
    generation=saved.generation,
    kv_scales=saved.kv_scales,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Saved:
  """What `model.json` says.

  Attributes:
    config: Shape of the model.
    dtype: Of its weights.
    tokenizer: Its tokenizer, if it has one.
    generation: Its defaults for generation.
    sizes: Bytes of each file of the weights.
    kv_scales: `[L, 2, K]` float32 scales of its keys and values, if any.
  """

  config: ModelConfig
  dtype: np.dtype
  tokenizer: Tokenizer | None
  generation: GenerationDefaults
  sizes: Mapping[str, int]
  kv_scales: np.ndarray | None


def _by_name(tree: Any) -> dict[tuple[str, ...], Any]:
  """Leaves by path; the metadata spells the layers' numbers as text."""
  return {
    tuple(str(entry.key) for entry in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _read_model_file(path: pathlib.Path) -> _Saved:
  file = path / _MODEL_FILE
  model = read_json(file)
  found = model.get("format")
  if found != _FORMAT:
    raise CheckpointError(
      f"{file} must have format {_FORMAT!r}; found {found!r}."
    )
  values = {}
  for name, read in _READERS.items():
    if name not in model:
      raise CheckpointError(f"{file} has no field {name!r}.")
    try:
      values[name] = read(model[name])
    # The tokenizer's binding raises bare `Exception`, wrong types raise theirs.
    except Exception as error:
      raise CheckpointError(f"{file} holds a wrong {name}: {error}") from error
  values["sizes"] = values.pop("bytes")
  scales = _read_scales(file, model.get("kv_scales"), values["config"])
  return _Saved(**values, kv_scales=scales)


def _read_config(fields: dict[str, Any]) -> ModelConfig:
  return ModelConfig(**fields | {"rope": RopeConfig(**fields["rope"])})


def _read_scales(
  file: pathlib.Path, scales: Any, config: ModelConfig
) -> np.ndarray | None:
  # Files from before there were scales do not speak of them.
  if scales is None:
    return None
  shape = (config.num_layers, 2, config.num_kv_heads)
  try:
    array = np.asarray(scales, np.float32)
    require_kv_scales("kv_scales", array, shape)
  except (TypeError, ValueError) as error:
    raise CheckpointError(f"{file} holds wrong scales: {error}") from error
  return array


def _read_tokenizer(text: str | None) -> Tokenizer | None:
  return None if text is None else Tokenizer.from_str(text)


def _read_generation(fields: dict[str, Any]) -> GenerationDefaults:
  # Checkpoints of before have no sampling: requests are greedy.
  sampling = SamplingParams(**fields.get("sampling", {}))
  return GenerationDefaults(**fields | {"sampling": sampling})


def _read_sizes(sizes: Mapping[str, int]) -> Mapping[str, int]:
  return {name: operator.index(size) for name, size in sizes.items()}


_READERS: Mapping[str, Callable[[Any], object]] = {
  "config": _read_config,
  "dtype": resolve_dtype,
  "tokenizer": _read_tokenizer,
  "generation": _read_generation,
  "bytes": _read_sizes,
}


def _check_files(path: pathlib.Path, sizes: Mapping[str, int]) -> None:
  for name, expected in sizes.items():
    file = path / name
    if not file.is_file():
      raise CheckpointError(f"{file} does not exist.")
    found = file.stat().st_size
    if found != expected:
      raise CheckpointError(
        f"{file} must have {expected} bytes; found {found}."
      )


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  # Which exception an unreadable file causes depends on the storage driver.
  except Exception as error:
    raise CheckpointError(f"{path}: weights are unreadable: {error}") from error


def _check_tensors(path: pathlib.Path, abstract: Any) -> None:
  """Compares names and shapes, which Orbax would report less clearly."""
  expected = _by_name(abstract)
  with _reading(path):
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
