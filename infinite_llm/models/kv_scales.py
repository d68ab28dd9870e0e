"""Scales of keys and values in float8_e4m3fn, as checkpoints have them.

What wrote them names them in its own way, by layer:

  self_attn.k_scale, .v_scale                 compressed-tensors, vLLM
  self_attn.attn.k_scale, .v_scale            vLLM, saved again
  self_attn.k_proj.k_scale, .v_proj.v_scale   ModelOpt
  self_attn.k_proj.output_scale, .v_proj...   AutoFP8

each one number, or one for each KV head. A number in the cache times its scale
is the key or value. Scales of queries may stand beside them: nothing here needs
those, since queries are not rounded.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models.registry import ModelConfig
from infinite_llm.rules import require_scales

_SCALE = re.compile(
  r"model\.layers\.(\d+)\.self_attn\."
  r"(?:(?:attn\.)?([kv])_scale|([kv])_proj\.(?:\3_scale|output_scale))"
)
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.(?:attn\.)?q_scale")


def scale_names(names: Iterable[str]) -> set[str]:
  """Those of a checkpoint's tensors that hold scales of keys and values."""
  return {name for name in names if _SCALE.fullmatch(name)}


def is_unused(name: str) -> bool:
  """Whether a tensor holds a scale of queries."""
  return _UNUSED.fullmatch(name) is not None


def join_scales(
  tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> np.ndarray | None:
  """Makes one array of the scales of all layers.

  Args:
    tensors: By name, those of `scale_names`.
    config: Shape of the model.

  Returns:
    `[L, 2, K]` float32; None if there are none at all.

  Raises:
    CheckpointError: If one is missing or there twice, of another shape, or not
      a positive number.
  """
  if not tensors:
    return None
  found: dict[tuple[int, str], str] = {}
  for name in sorted(tensors):
    match = _SCALE.fullmatch(name)
    place = (int(match[1]), match[2] or match[3])
    if place in found:
      raise CheckpointError(
        f"{name} and {found[place]} are two scales of the same numbers."
      )
    found[place] = name
  num_heads = config.num_kv_heads
  scales = np.zeros((config.num_layers, 2, num_heads), np.float32)
  for layer in range(config.num_layers):
    for i, letter in enumerate("kv"):
      name = found.pop((layer, letter), None)
      if name is None:
        raise CheckpointError(
          f"Layer {layer} has no {letter}_scale, but other layers have scales."
        )
      values = tensors[name].astype(np.float32)
      if values.size not in (1, num_heads):
        raise CheckpointError(
          f"{name} must have 1 number or one for each of {num_heads} KV heads;"
          f" found shape {list(values.shape)}."
        )
      scales[layer, i] = values.reshape(-1)
      try:
        require_scales(name, values)
      except ConfigError as error:
        raise CheckpointError(str(error)) from error
  if found:
    raise CheckpointError(
      f"{next(iter(found.values()))} is of a layer beyond the"
      f" {config.num_layers} of config.json."
    )
  return scales
