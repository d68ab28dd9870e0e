import dataclasses
import math

import pytest

from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models.registry import ModelConfig, from_hf
from infinite_llm.models.rope import RopeConfig

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_hidden_layers": 3,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05,
  "vocab_size": 256,
}
CONFIG = ModelConfig(
  vocab_size=256,
  model_dim=64,
  mlp_dim=96,
  num_layers=3,
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=16,
  norm_eps=1e-5,
)


def _of(architecture, **fields):
  return from_hf({**LLAMA, "architectures": [architecture], **fields})


def test_a_plain_llama_is_read():
  assert from_hf(LLAMA) == CONFIG


def test_the_model_type_stands_in_for_a_missing_architecture():
  fields = {k: v for k, v in LLAMA.items() if k != "architectures"}

  assert from_hf({**fields, "model_type": "llama"}) == CONFIG


def test_null_fields_take_their_defaults():
  config = from_hf({**LLAMA, "head_dim": None, "num_key_value_heads": None})

  assert config.head_dim == 16
  assert config.num_kv_heads == 4


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
    (
      {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
      RopeConfig(theta=5e5),
    ),
    (
      {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
      RopeConfig(scaling="linear", factor=2.0),
    ),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
      RopeConfig(scaling="linear", factor=2.0),
    ),
    ({"rope_theta": 1e32}, RopeConfig(theta=1e32)),
  ],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(fields, expected):
  assert from_hf({**LLAMA, **fields}).rope == expected


LLAMA3_SCALING = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}},
  ],
)
def test_llama3_scaling_is_read_in_both_spellings(fields):
  assert from_hf({**LLAMA, **fields}).rope == RopeConfig(
    theta=5e5,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )


def test_llama3_scaling_falls_back_to_the_trained_context():
  scaling = {**LLAMA3_SCALING, "original_max_position_embeddings": None}
  fields = {"rope_scaling": scaling, "max_position_embeddings": 512}

  rope = from_hf({**LLAMA, **fields}).rope

  assert rope.original_max_position_embeddings == 512


def test_mistral_windows_every_layer():
  config = _of("MistralForCausalLM", sliding_window=40)

  assert [config.layer_window(i) for i in range(3)] == [40, 40, 40]
  assert _of("MistralForCausalLM", sliding_window=None).sliding_window is None
  assert _of("MistralForCausalLM").sliding_window == 4096


def test_qwen2_has_qkv_biases_and_no_window_unless_asked_for():
  config = _of("Qwen2ForCausalLM", sliding_window=40, max_window_layers=1)

  assert (config.qkv_bias, config.out_bias) == (True, False)
  assert config.layer_window(2) is None


@pytest.mark.parametrize(
  "architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
@pytest.mark.parametrize(
  "fields",
  [
    {"max_window_layers": 1},
    {
      "max_window_layers": 3,
      "layer_types": ["full_attention", *["sliding_attention"] * 2],
    },
  ],
)
def test_qwen_windows_start_at_a_layer_or_are_listed(architecture, fields):
  config = _of(
    architecture, use_sliding_window=True, sliding_window=40, **fields
  )

  assert [config.layer_window(i) for i in range(3)] == [None, 40, 40]


def test_qwen3_normalises_queries_and_keys_and_names_its_head_dim():
  config = _of("Qwen3ForCausalLM", head_dim=32)

  assert config == dataclasses.replace(CONFIG, head_dim=32, qk_norm=True)
  assert _of("Qwen3ForCausalLM").head_dim == 128


def test_llama_biases_are_read():
  config = from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})

  assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True,) * 3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"architectures": ["MambaForCausalLM"]},
      r"Unknown architecture: MambaForCausalLM\. Implemented are LlamaFor",
    ),
    (
      {"architectures": [], "model_type": "mamba"},
      r"Unknown architecture: model_type 'mamba'",
    ),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
      r"RoPE scaling of type 'yarn' is not implemented",
    ),
    (
      {"rope_scaling": {"type": "llama3", "factor": 4.0}},
      r"type 'llama3' lacks low_freq_factor, high_freq_factor",
    ),
    (
      {"rope_parameters": {"partial_rotary_factor": 0.5}},
      r"partial_rotary_factor=0\.5 is not implemented",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
      r"RoPE parameters that differ between layer types \(full_attention\)",
    ),
    (
      {"architectures": "LlamaForCausalLM"},
      r"architectures must be a list of names; got 'LlamaForCausalLM'",
    ),
    ({"architectures": 5}, r"architectures must be a list of names; got 5"),
    ({"architectures": [["x"]]}, r"must be a list of names; got \[\['x'\]\]"),
    (
      {"architectures": None, "model_type": ["x"]},
      r"Unknown architecture: model_type",
    ),
    (
      {"tie_word_embeddings": "false"},
      r"tie_word_embeddings must be true or false; got 'false'",
    ),
    ({"attention_bias": 1}, r"attention_bias must be true or false; got 1"),
    ({"mlp_bias": "no"}, r"mlp_bias must be true or false; got 'no'"),
    ({"rms_norm_eps": math.nan}, r"norm_eps must be finite .*; got nan"),
    ({"rms_norm_eps": "1"}, r"rms_norm_eps must be a number; got '1'"),
    ({"rope_theta": "x"}, r"rope_theta must be a number; got 'x'"),
    ({"rope_scaling": 5}, r"rope_scaling must be an object; got 5"),
    (
      {"rope_scaling": {"type": "linear", "factor": "2"}},
      r"factor must be a number; got '2'",
    ),
    ({"num_key_value_heads": 0}, r"num_kv_heads must be a positive .* got 0"),
    ({"head_dim": 16.0}, r"head_dim must be an integer; got 16\.0"),
    ({"hidden_size": "64"}, r"hidden_size must be an integer; got '64'"),
    ({"num_attention_heads": 0}, r"config\.json of LlamaForCausalLM: .* zero"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not implemented"),
    (
      {"quantization_config": {"bits": 4}},
      r"quantization_config=\{'bits': 4\} is not implemented",
    ),
    ({"hidden_size": None}, r"config\.json has no field 'hidden_size'"),
    (
      {"num_key_value_heads": 3},
      r"num_q_heads must be a multiple of num_kv_heads \(3\); got 4",
    ),
    ({"vocab_size": 1.5}, r"vocab_size must be an integer; got 1\.5"),
    ({"hidden_size": 60}, r"head_dim must be even; got 15"),
    ({"rope_theta": -1}, r"theta must be positive and finite; got -1\.0"),
  ],
)
def test_what_is_unknown_or_not_implemented_is_named(fields, message):
  with pytest.raises(CheckpointError, match=message):
    from_hf({**LLAMA, **fields})


@pytest.mark.parametrize(
  ("types", "message"),
  [
    (["full_attention"], r"layer_types must name num_hidden_layers=3 .* got 1"),
    ("full_attention", r"layer_types must be a list of names; got 'full_att"),
    (["chunked_attention"] * 3, r"layer_types chunked_attention are not impl"),
  ],
)
def test_wrong_layer_types_are_refused(types, message):
  with pytest.raises(CheckpointError, match=message):
    _of(
      "Qwen2ForCausalLM",
      use_sliding_window=True,
      sliding_window=4,
      layer_types=types,
    )


def test_a_window_is_not_asked_for_by_a_text():
  message = r"use_sliding_window must be true or false; got 'false'"
  with pytest.raises(CheckpointError, match=message):
    _of("Qwen2ForCausalLM", use_sliding_window="false")


def test_windowed_layers_must_exist():
  with pytest.raises(ConfigError, match=r"windowed_layers must be in \[0, 3\)"):
    dataclasses.replace(CONFIG, windowed_layers=(3,))


class TestDoublingTokens:
  def test_it_weighs_attention_against_the_other_products(self):
    # A layer of an 8B Llama 3 multiplies by 218 M weights, and attention by
    # 2 * 4096 numbers for each token.
    config = dataclasses.replace(
      CONFIG,
      model_dim=4096,
      mlp_dim=14336,
      num_layers=32,
      num_q_heads=32,
      num_kv_heads=8,
      head_dim=128,
    )
    weights = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert config.doubling_tokens == weights / 8192 == 26624

  def test_layers_with_a_window_do_not_grow(self):
    few = dataclasses.replace(CONFIG, sliding_window=8, windowed_layers=(0, 2))
    none = dataclasses.replace(CONFIG, sliding_window=8)
    assert few.doubling_tokens == 3 * CONFIG.doubling_tokens
    assert none.doubling_tokens == math.inf
