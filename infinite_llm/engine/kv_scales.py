"""Which scales the pools of an engine have, and where they lie."""

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.config import EngineConfig
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.transformer import pool_kv_heads
from infinite_llm.rules import require_kv_scales
from infinite_llm.types import TENSOR_AXIS


def place_kv_scales(
  model: LoadedModel, config: EngineConfig
) -> jax.Array | None:
  """Puts the scales of keys and values on all devices.

  Args:
    model: Parameters on their mesh, and scales, if its checkpoint had any.
    config: The dtype of keys and values, and perhaps their scales.

  Returns:
    `[L, 2, K]` float32 for the KV heads of the pools, sharded over "tensor";
    None if keys and values are kept as they are.

  Raises:
    ConfigError: If they cannot be read or do not fit the model.
  """
  if config.cache.kv_dtype != "float8_e4m3fn":
    return None
  scales = find_kv_scales(model, config)
  # A head that several ranks hold has the same scale on all of them.
  num_heads = pool_kv_heads(model.config, config.tensor_parallel)
  scales = np.repeat(scales, num_heads // scales.shape[2], axis=2)
  sharding = NamedSharding(model.mesh, PartitionSpec(None, None, TENSOR_AXIS))
  return jax.make_array_from_callback(
    scales.shape, sharding, lambda index: scales[index]
  )


def find_kv_scales(model: LoadedModel, config: EngineConfig) -> np.ndarray:
  """Finds scales: those asked for, else those of the checkpoint, else 1.

  Args:
    model: Its checkpoint may have had some.
    config: May name some.

  Returns:
    `[L, 2, K]` float32 for the KV heads of the model.

  Raises:
    ConfigError: If they cannot be read or do not fit the model.
  """
  shape = (model.config.num_layers, 2, model.config.num_kv_heads)
  asked = config.cache.kv_scales
  if asked is None and model.kv_scales is None:
    logging.warning(
      "Keys and values in float8_e4m3fn have scale 1: the checkpoint has no"
      " scales, and kv_scales gives none. calibrate_kv_scales() finds them."
    )
    return np.ones(shape, np.float32)
  if asked is None:
    return model.kv_scales
  name = "kv_scales"
  if isinstance(asked, str):
    name = f"kv_scales of {asked}"
    scales = _load(asked)
  else:
    scales = np.asarray(asked)
  require_kv_scales(name, scales, shape)
  return scales.astype(np.float32)


def _load(path: str) -> np.ndarray:
  try:
    scales = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(
      f"kv_scales must be an array or a .npy file of one; got {path!r}:"
      f" {error}."
    ) from error
  if not isinstance(scales, np.ndarray):
    scales.close()
    raise ConfigError(
      f"kv_scales must be a file of one array; got {path!r}, which has several."
    )
  return scales
