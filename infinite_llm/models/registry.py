"""Model configurations, and how to read them from `config.json`.

A decoder-only Llama-like model has few degrees of freedom: `ModelConfig` spells
them out, and each supported architecture is one function that fills them in.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models.rope import RopeConfig

_SIZES = (
  "vocab_size",
  "model_dim",
  "mlp_dim",
  "num_layers",
  "num_q_heads",
  "num_kv_heads",
  "head_dim",
)
_OPTIONAL_SIZES = ("sliding_window", "max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Shape of a decoder-only transformer.

  Attributes:
    vocab_size: V.
    model_dim: Width of the residual stream.
    mlp_dim: Width inside the gated MLP.
    num_layers: L.
    num_q_heads: Query heads of the whole model.
    num_kv_heads: KV heads of the whole model; divides `num_q_heads`.
    head_dim: D, even; need not be `model_dim / num_q_heads`.
    norm_eps: Added to the mean square in every RMSNorm.
    rope: Rotary frequencies.
    tie_embeddings: Whether the embedding is also the output head.
    qkv_bias: Whether the query, key and value projections have a bias.
    out_bias: Whether the attention's output projection has one.
    mlp_bias: Whether the projections of the MLP have one.
    qk_norm: Whether queries and keys are normalised per head before RoPE.
    sliding_window: Tokens that a windowed layer sees, the query's included;
      None if no layer has a window.
    windowed_layers: Layers with that window, rising; None means all.
    max_position_embeddings: Context that the model was trained for, in tokens;
      None if unknown. A property of its quality, not a limit of this system.
  """

  vocab_size: int
  model_dim: int
  mlp_dim: int
  num_layers: int
  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-6
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  tie_embeddings: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  windowed_layers: tuple[int, ...] | None = None
  max_position_embeddings: int | None = None

  def __post_init__(self):
    for name in _SIZES + _OPTIONAL_SIZES:
      value = getattr(self, name)
      if value is None and name in _OPTIONAL_SIZES:
        continue
      # JSON may hold a float or a bool (which is an int): neither is a size.
      if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be a positive integer; got {value!r}.")
    if self.head_dim % 2:
      raise ConfigError(f"head_dim must be even; got {self.head_dim}.")
    if self.num_q_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_q_heads must be a multiple of num_kv_heads ({self.num_kv_heads});"
        f" got {self.num_q_heads}."
      )
    if not 0 <= self.norm_eps < math.inf:
      raise ConfigError(
        f"norm_eps must be finite and not negative; got {self.norm_eps}."
      )
    if self.windowed_layers is not None:
      object.__setattr__(self, "windowed_layers", tuple(self.windowed_layers))
      if not set(self.windowed_layers) <= set(range(self.num_layers)):
        raise ConfigError(
          f"windowed_layers must be in [0, {self.num_layers}); got "
          f"{self.windowed_layers}."
        )

  def layer_window(self, layer: int) -> int | None:
    """Tokens that a layer's queries see, their own included; None is all."""
    if self.windowed_layers is None or layer in self.windowed_layers:
      return self.sliding_window
    return None

  @property
  def doubling_tokens(self) -> float:
    """Context at which attention has a token compute as much as all else.

    By the products of matrices in the layers, of which attention's grow with
    the context where there is no window; infinite if all layers have one.
    """
    q_dim, kv_dim = (
      n * self.head_dim for n in (self.num_q_heads, self.num_kv_heads)
    )
    weights = 2 * self.model_dim * (q_dim + kv_dim) + 3 * (
      self.model_dim * self.mlp_dim
    )
    windows = map(self.layer_window, range(self.num_layers))
    num_growing = sum(window is None for window in windows)
    if not num_growing:
      return math.inf
    # Two products for the query heads of each token that is attended.
    return self.num_layers * weights / (num_growing * 2 * q_dim)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
  """Reads a Hugging Face `config.json`, as old and new `transformers` write it.

  Args:
    config: The parsed file.

  Returns:
    The configuration of the model that it describes.

  Raises:
    CheckpointError: If the architecture is unknown, a field is missing or
      wrong, or the model has a feature that is not implemented. The message
      names it.
  """
  architecture = _architecture(config)
  _refuse_unimplemented(config, architecture)
  try:
    return _ARCHITECTURES[architecture](config)
  except CheckpointError:
    raise
  # Wrong values are caught by `ModelConfig`, wrong types also on the way there.
  except (ArithmeticError, TypeError, ValueError) as error:
    raise CheckpointError(f"config.json of {architecture}: {error}") from error


def _architecture(config: Mapping[str, Any]) -> str:
  names = config.get("architectures") or []
  if not _are_texts(names):
    raise CheckpointError(
      f"config.json: architectures must be a list of names; got {names!r}."
    )
  if not names:
    model_type = str(config.get("model_type"))
    names = [_BY_MODEL_TYPE.get(model_type, f"model_type {model_type!r}")]
  if len(names) != 1 or names[0] not in _ARCHITECTURES:
    raise CheckpointError(
      f"Unknown architecture: {', '.join(names)}. Implemented are "
      f"{', '.join(_ARCHITECTURES)}."
    )
  return names[0]


def _refuse_unimplemented(config: Mapping[str, Any], architecture: str) -> None:
  for name, implemented in (
    ("hidden_act", "silu"),
    ("partial_rotary_factor", 1.0),
    ("quantization_config", None),
  ):
    value = config.get(name)
    if name == "quantization_config" and _is_of_kv_alone(value):
      continue
    if value is not None and value != implemented:
      raise CheckpointError(
        f"{architecture} with {name}={value!r} is not implemented."
      )


def _is_of_kv_alone(quantization: Any) -> bool:
  """Whether weights are as ever and keys and values have scales in float8.

  That is how llm-compressor and ModelOpt write it: no group quantises weights.
  Whether the cache is in float8 is the engine's configuration.
  """
  if not isinstance(quantization, Mapping) or quantization.get("quant_algo"):
    return False
  groups = quantization.get("config_groups") or {}
  scheme = quantization.get("kv_cache_scheme") or {}
  return (
    quantization.get("quant_method") in ("compressed-tensors", "modelopt")
    and not any(group.get("weights") for group in groups.values())
    and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    and not scheme.get("dynamic")
  )


def _are_texts(value: object) -> bool:
  return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _required(config: Mapping[str, Any], name: str) -> int:
  """An integer that must be there."""
  value = _optional(config, name)
  if value is None:
    raise CheckpointError(f"config.json has no field {name!r}.")
  return value


def _optional(config: Mapping[str, Any], name: str) -> int | None:
  """An integer, or None; that sizes are positive is for `ModelConfig`."""
  value = config.get(name)
  # JSON may hold a float or a bool (which is an int): neither is a size.
  if value is not None and type(value) is not int:
    raise CheckpointError(
      f"config.json: {name} must be an integer; got {value!r}."
    )
  return value


def _number(
  config: Mapping[str, Any], name: str, default: float | None = None
) -> float:
  """A number; an error if it is not there and has no default."""
  value = config.get(name)
  value = default if value is None else value
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise CheckpointError(
      f"config.json: {name} must be a number; got {value!r}."
    )
  return float(value)


def _flag(config: Mapping[str, Any], name: str) -> bool:
  """A flag, false unless said; a text like "false" would count as true."""
  value = config.get(name)
  if not isinstance(value, bool | None):
    raise CheckpointError(
      f"config.json: {name} must be true or false; got {value!r}."
    )
  return bool(value)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
  """Reads `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`.

  Raises:
    CheckpointError: If the scaling is of an unknown type or incomplete.
  """
  for name in ("rope_parameters", "rope_scaling"):
    parameters = config.get(name) or {}
    if not isinstance(parameters, Mapping):
      raise CheckpointError(
        f"config.json: {name} must be an object; got {parameters!r}."
      )
    if parameters:
      break
  if any(isinstance(value, Mapping) for value in parameters.values()):
    raise CheckpointError(
      "RoPE parameters that differ between layer types "
      f"({', '.join(parameters)}) are not implemented."
    )
  theta = _number(
    parameters if "rope_theta" in parameters else config, "rope_theta", 10_000.0
  )
  kind = parameters.get("rope_type", parameters.get("type")) or "default"
  if parameters.get("partial_rotary_factor", 1.0) != 1.0:
    raise CheckpointError(
      "RoPE with partial_rotary_factor="
      f"{parameters['partial_rotary_factor']!r} is not implemented."
    )
  if kind == "default":
    return RopeConfig(theta=theta)
  if kind == "linear":
    fields = ("factor",)
  elif kind == "llama3":
    fields = ("factor", "low_freq_factor", "high_freq_factor")
  else:
    raise CheckpointError(
      f"RoPE scaling of type {kind!r} is not implemented; linear and llama3 "
      "are."
    )
  missing = [name for name in fields if parameters.get(name) is None]
  if missing:
    raise CheckpointError(
      f"RoPE scaling of type {kind!r} lacks {', '.join(missing)}."
    )
  scaling = {name: _number(parameters, name) for name in fields}
  if kind == "llama3":
    # transformers 5 falls back to the trained context, so does this.
    name = "original_max_position_embeddings"
    trained = _optional(parameters, name)
    if trained is None:
      trained = _required(config, "max_position_embeddings")
    scaling[name] = trained
  return RopeConfig(theta=theta, scaling=kind, **scaling)


def _common(config: Mapping[str, Any], **fields: Any) -> ModelConfig:
  """Fills in what all architectures spell alike; `fields` come on top."""
  model_dim = _required(config, "hidden_size")
  num_q_heads = _required(config, "num_attention_heads")
  num_kv_heads = _optional(config, "num_key_value_heads")
  head_dim = _optional(config, "head_dim")
  shared = {
    "vocab_size": _required(config, "vocab_size"),
    "model_dim": model_dim,
    "mlp_dim": _required(config, "intermediate_size"),
    "num_layers": _required(config, "num_hidden_layers"),
    "num_q_heads": num_q_heads,
    "num_kv_heads": num_q_heads if num_kv_heads is None else num_kv_heads,
    "head_dim": model_dim // num_q_heads if head_dim is None else head_dim,
    "norm_eps": _number(config, "rms_norm_eps", 1e-6),
    "rope": _rope(config),
    "tie_embeddings": _flag(config, "tie_word_embeddings"),
    "max_position_embeddings": _optional(config, "max_position_embeddings"),
  }
  return ModelConfig(**shared | fields)


def _llama(config: Mapping[str, Any]) -> ModelConfig:
  bias = _flag(config, "attention_bias")
  mlp_bias = _flag(config, "mlp_bias")
  return _common(config, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _mistral(config: Mapping[str, Any]) -> ModelConfig:
  # Null means no window; a file without the field has the architecture's own.
  window = {"sliding_window": 4096, **config}
  return _common(config, sliding_window=_optional(window, "sliding_window"))


def _qwen2(config: Mapping[str, Any]) -> ModelConfig:
  return _common(config, qkv_bias=True, **_qwen_windows(config))


def _qwen3(config: Mapping[str, Any]) -> ModelConfig:
  bias = _flag(config, "attention_bias")
  head_dim = _optional(config, "head_dim")
  return _common(
    config,
    # Older files leave out head_dim where it has the architecture's default.
    head_dim=128 if head_dim is None else head_dim,
    qkv_bias=bias,
    out_bias=bias,
    qk_norm=True,
    **_qwen_windows(config),
  )


def _qwen_windows(config: Mapping[str, Any]) -> dict[str, Any]:
  """Windows of Qwen models: the layers from `max_window_layers` on have one."""
  if not _flag(config, "use_sliding_window"):
    return {}
  window = _required(config, "sliding_window")
  num_layers = _required(config, "num_hidden_layers")
  types = config.get("layer_types")
  if types is None:
    first = _required(config, "max_window_layers")
    layers = range(min(first, num_layers), num_layers)
    return {"sliding_window": window, "windowed_layers": tuple(layers)}
  if not _are_texts(types):
    raise CheckpointError(
      f"config.json: layer_types must be a list of names; got {types!r}."
    )
  unknown = set(types) - {"full_attention", "sliding_attention"}
  if unknown:
    raise CheckpointError(
      f"layer_types {', '.join(sorted(unknown))} are not implemented."
    )
  if len(types) != num_layers:
    raise CheckpointError(
      f"layer_types must name num_hidden_layers={num_layers} layers; got "
      f"{len(types)}."
    )
  layers = tuple(i for i, t in enumerate(types) if t == "sliding_attention")
  return {"sliding_window": window, "windowed_layers": layers}


_ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
  "LlamaForCausalLM": _llama,
  "MistralForCausalLM": _mistral,
  "Qwen2ForCausalLM": _qwen2,
  "Qwen3ForCausalLM": _qwen3,
}

_BY_MODEL_TYPE = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
