"""Reads a Hugging Face model folder straight onto a mesh.

The model is built abstractly; then each tensor is read slice by slice, every
slice once, cast, and put only on the devices that hold that shard. Beside the
model itself, the host holds at most one tensor at a time. `safetensors` gives
bfloat16 through NumPy, so no other framework is needed.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from infinite_llm.errors import CheckpointError
from infinite_llm.models.kv_scales import is_unused, join_scales, scale_names
from infinite_llm.models.loaded_model import (
  GenerationDefaults,
  LoadedModel,
  resolve_dtype,
)
from infinite_llm.models.registry import from_hf
from infinite_llm.models.transformer import abstract_transformer, param_specs
from infinite_llm.types import TENSOR_AXIS

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_DTYPE_OF = {"F32": "float32", "BF16": "bfloat16", "F16": "bfloat16"}
_COMPARE_ROWS = 8192  # Of embedding and head at once, to bound memory.


def load_hf(
  path: str | pathlib.Path, mesh: Mesh, *, dtype: DTypeLike | None = None
) -> LoadedModel:
  """Loads a Hugging Face folder onto a mesh.

  *Blocks the host* while it reads.

  Args:
    path: Folder with `config.json`, `model.safetensors` or its indexed parts,
      and, where the model has them, `tokenizer.json`, `tokenizer_config.json`,
      `chat_template.jinja` and `generation_config.json`.
    mesh: A mesh from `make_mesh`. Weights are sharded over "tensor" and
      replicated over "instance".
    dtype: "float32" or "bfloat16"; weights are cast to it while read. None
      keeps the checkpoint's own, with bfloat16 for float16.

  Returns:
    The model.

  Raises:
    CheckpointError: If a file is missing or unreadable, a tensor is missing,
      unexpected or of another shape than the configuration says, the embedding
      is said to be tied but is not, scales of keys and values are incomplete or
      not positive, or the architecture is not implemented.
    ConfigError: If the dtype is neither, or the mesh cannot shard this model.
  """
  folder = pathlib.Path(path)
  hf_config = _read_json(folder / "config.json")
  config = from_hf(hf_config)
  specs = param_specs(config, mesh)
  tokenizer = _read_tokenizer(folder)
  generation = _read_generation(folder, hf_config, tokenizer)

  with contextlib.ExitStack() as stack:
    if dtype is not None:
      dtype = resolve_dtype(dtype)  # Before any file is looked for.
    tensors = _Tensors(folder, stack)
    graphdef, abstract = abstract_transformer(
      config,
      dtype=resolve_dtype(tensors.dtype) if dtype is None else dtype,
      tensor_axis=TENSOR_AXIS,
    )
    expected = {
      _tensor_name(key_path): leaf
      for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    tensors.check(expected)
    if config.tie_embeddings and _HEAD in tensors.names:
      tensors.check_tied()

    def read(key_path, leaf: jax.ShapeDtypeStruct, spec: PartitionSpec):
      name = _tensor_name(key_path)
      return tensors.read(name, leaf, NamedSharding(mesh, spec))

    state = jax.tree_util.tree_map_with_path(read, abstract, specs)
    kv_scales = join_scales(
      {name: tensors.read_whole(name) for name in scale_names(tensors.names)},
      config,
    )
  return LoadedModel(
    config=config,
    graphdef=graphdef,
    state=state,
    mesh=mesh,
    tokenizer=tokenizer,
    generation=generation,
    kv_scales=kv_scales,
  )


def _tensor_name(key_path) -> str:
  """Where Hugging Face keeps the weight at a path of the model's state."""
  name = ".".join(str(entry.key) for entry in key_path)
  return name if name == _HEAD else f"model.{name}"


class _Tensors:
  """The tensors of a checkpoint, in however many files."""

  def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
    """Opens the files.

    Args:
      folder: Where they are.
      stack: Closes them.

    Raises:
      CheckpointError: If one is missing, truncated or no safetensors file, or
        lacks a tensor that the index promises.
    """
    self._files: dict[str, Any] = {}
    self._file_names: dict[str, str] = {}
    for file_name, promised in _weight_files(folder).items():
      file = stack.enter_context(_open_safetensors(folder / file_name))
      names = set(file.keys())
      missing = sorted((promised or names) - names)
      if missing:
        raise CheckpointError(
          f"{folder / file_name} lacks tensor {missing[0]}, which "
          f"{_INDEX_FILE} says it has."
        )
      for name in names if promised is None else promised:
        self._files[name] = file
        self._file_names[name] = str(folder / file_name)
    self._folder = folder

  @property
  def names(self) -> set[str]:
    """All tensors of the checkpoint."""
    return set(self._files)

  @property
  def dtype(self) -> str:
    """Dtype of the weights, to be computed with.

    That of the embedding: quantised checkpoints keep it as it was. Without one
    the checkpoint is refused later, by `check`.
    """
    if _EMBEDDING not in self._files:
      return "float32"
    stored = self._files[_EMBEDDING].get_slice(_EMBEDDING).get_dtype()
    return _DTYPE_OF.get(stored, stored)

  def check(self, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Compares names and shapes with the model's, before anything is read.

    Args:
      expected: The whole weights by name.

    Raises:
      CheckpointError: Naming what is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in self._files]
    if missing:
      raise CheckpointError(
        f"{self._folder} lacks tensor {missing[0]} of shape "
        f"{list(expected[missing[0]].shape)}{_and_more(missing)}."
      )
    # A weight that no part of the model uses means that the configuration does
    # not describe this checkpoint: going on would give wrong answers silently.
    unexpected = sorted(
      name
      for name in self.names - set(expected) - scale_names(self.names)
      if name != _HEAD
      and not name.endswith("rotary_emb.inv_freq")
      and not is_unused(name)
    )
    if unexpected:
      raise CheckpointError(
        f"{self._file_names[unexpected[0]]} has tensor {unexpected[0]}, which "
        f"the model of config.json does not use{_and_more(unexpected)}."
      )
    for name, leaf in expected.items():
      self._check_shape(name, leaf.shape)

  def check_tied(self) -> None:
    """Checks that a head stored beside a tied embedding is equal to it.

    Raises:
      CheckpointError: If it is not.
    """
    embedding = self._files[_EMBEDDING].get_slice(_EMBEDDING)
    head = self._files[_HEAD].get_slice(_HEAD)
    vocab_size, _ = embedding.get_shape()
    self._check_shape(_HEAD, embedding.get_shape())
    for start in range(0, vocab_size, _COMPARE_ROWS):
      rows = slice(start, min(start + _COMPARE_ROWS, vocab_size))
      if not np.array_equal(embedding[rows], head[rows]):
        raise CheckpointError(
          f"{self._file_names[_HEAD]}: {_HEAD} differs from {_EMBEDDING}, but "
          "config.json says tie_word_embeddings=true."
        )

  def read_whole(self, name: str) -> np.ndarray:
    """Reads a small tensor as it is stored."""
    return self._files[name].get_tensor(name)

  def read(
    self, name: str, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
  ) -> jax.Array:
    """Reads each shard of a tensor once, onto all devices that hold it.

    Args:
      name: Which tensor.
      leaf: Its whole shape and the dtype to cast to.
      sharding: Where its shards go.

    Returns:
      The array on its devices.
    """
    source = self._files[name].get_slice(name)
    shards: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      key = tuple((s.start, s.stop) for s in index)
      if key not in shards:
        shards[key] = source[index].astype(leaf.dtype, copy=False)
      return shards[key]

    return jax.make_array_from_callback(
      leaf.shape, sharding, shard, dtype=leaf.dtype
    )

  def _check_shape(self, name: str, expected) -> None:
    found = self._files[name].get_slice(name).get_shape()
    if list(found) != list(expected):
      raise CheckpointError(
        f"{self._file_names[name]}: {name} must have shape {list(expected)} as "
        f"config.json says; found {list(found)}."
      )


def _and_more(names: list[str]) -> str:
  return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """Maps each weight file to the tensors promised in it; None is any."""
  if (folder / _SINGLE_FILE).is_file():
    return {_SINGLE_FILE: None}
  if not (folder / _INDEX_FILE).is_file():
    raise CheckpointError(
      f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}."
    )
  weight_map = _read_json(folder / _INDEX_FILE).get("weight_map")
  if not isinstance(weight_map, dict):
    raise CheckpointError(f"{folder / _INDEX_FILE} has no weight_map.")
  files: dict[str, set[str] | None] = {}
  for name, file_name in weight_map.items():
    files.setdefault(file_name, set()).add(name)
  return files


def _open_safetensors(file: pathlib.Path):
  if not file.is_file():
    raise CheckpointError(f"{file} does not exist.")
  try:
    return safe_open(file, framework="numpy")
  except (SafetensorError, OSError) as error:
    raise CheckpointError(
      f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors "
      f"file: {error}."
    ) from error


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  if not file.is_file():
    raise CheckpointError(f"{file} does not exist.")
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise CheckpointError(f"{file} is not readable JSON: {error}.") from error
  if not isinstance(content, dict):
    raise CheckpointError(f"{file} must hold a JSON object.")
  return content


def _read_optional_json(file: pathlib.Path) -> dict[str, Any]:
  return _read_json(file) if file.is_file() else {}


def _read_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
  file = folder / "tokenizer.json"
  if not file.is_file():
    return None
  try:
    return Tokenizer.from_file(str(file))
  # The binding raises bare `Exception` whatever is wrong with the file.
  except Exception as error:
    raise CheckpointError(f"{file} is not a tokenizer: {error}.") from error


def _read_generation(
  folder: pathlib.Path,
  hf_config: Mapping[str, Any],
  tokenizer: Tokenizer | None,
) -> GenerationDefaults:
  """Reads what `transformers` would use; the more specific file wins."""
  generation = _read_optional_json(folder / "generation_config.json")
  texts = _read_optional_json(folder / "tokenizer_config.json")
  bos_token, eos_token = (
    _token_text(texts.get(name)) for name in ("bos_token", "eos_token")
  )

  def token_ids(name: str, text: str | None) -> tuple[int, ...]:
    for source in (generation, hf_config):
      value = source.get(name)
      if value is not None:
        return tuple(value) if isinstance(value, list) else (value,)
    if tokenizer is None or text is None:
      return ()
    token = tokenizer.token_to_id(text)
    return () if token is None else (token,)

  bos_token_ids = token_ids("bos_token_id", bos_token)
  return GenerationDefaults(
    eos_token_ids=token_ids("eos_token_id", eos_token),
    bos_token_id=bos_token_ids[0] if bos_token_ids else None,
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=_read_chat_template(folder, texts.get("chat_template")),
  )


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
  """Special tokens are written as text or as an object with a content."""
  return token["content"] if isinstance(token, Mapping) else token


def _read_chat_template(folder: pathlib.Path, inline: Any) -> str | None:
  file = folder / "chat_template.jinja"
  if file.is_file():
    return file.read_text(encoding="utf-8")
  if isinstance(inline, list):
    named = {entry["name"]: entry["template"] for entry in inline}
    return named.get("default")
  return inline
