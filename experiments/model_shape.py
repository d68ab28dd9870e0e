"""The shape of a model in a config file, as a library value and as JSON."""

from typing import Any

import ml_collections

from infinite_llm.models.registry import ModelConfig

_HF_NAMES = {
  "vocab_size": "vocab_size",
  "model_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_q_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
}


def model_shape(config: ml_collections.ConfigDict) -> ModelConfig:
  """The shape that a config asks for.

  Args:
    config: Sizes, as fields of `ModelConfig`; others are not read.
  """
  return ModelConfig(**{name: config[name] for name in _HF_NAMES})


def hf_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The same as a Hugging Face `config.json` would say it.

  Args:
    config: Sizes, as fields of `ModelConfig`, and the `dtype`.
  """
  sizes = {theirs: config[ours] for ours, theirs in _HF_NAMES.items()}
  return {
    "architectures": ["LlamaForCausalLM"],
    "dtype": config.dtype,
    **sizes,
  }
