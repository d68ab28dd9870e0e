"""Compares with `transformers` itself, where it and `torch` are installed."""

import numpy as np
import pytest

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.models.hf_loader import load_hf
from tests import testing
from tests.tolerances import tolerance

pytestmark = [
  pytest.mark.slow,
  # Other people's deprecations are not this project's errors.
  pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def golden():
  """The script that makes golden values, if it can be imported here."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from tests.golden import make_golden

  return make_golden


def _scaling(rng):
  theta = float(10 ** rng.uniform(3, 7))
  kind = rng.choice(["default", "linear", "llama3"])
  parameters = {"rope_type": str(kind), "rope_theta": theta}
  if kind != "default":
    parameters["factor"] = float(rng.uniform(2, 8))
  if kind == "llama3":
    parameters["low_freq_factor"] = float(rng.uniform(0.5, 1.5))
    parameters["high_freq_factor"] = float(rng.uniform(2, 6))
    parameters["original_max_position_embeddings"] = int(rng.integers(16, 128))
  return parameters


def _random_config(family, rng):
  import transformers

  kv_heads = int(rng.integers(1, 4))
  heads = kv_heads * int(rng.integers(1, 4))
  head_dim = 2 * int(rng.integers(4, 17))
  fields = {
    "vocab_size": 256,
    "hidden_size": heads * head_dim,
    "intermediate_size": int(rng.integers(16, 128)),
    "num_hidden_layers": int(rng.integers(1, 5)),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "rms_norm_eps": float(10 ** rng.uniform(-7, -4)),
    "rope_parameters": _scaling(rng),
    "tie_word_embeddings": bool(rng.integers(2)),
    "eos_token_id": 2,
  }
  flag = bool(rng.integers(2))
  window = int(rng.integers(2, 64))
  if family == "llama":
    return transformers.LlamaConfig(
      **fields, attention_bias=flag, mlp_bias=bool(rng.integers(2))
    )
  if family == "mistral":
    # The head dimension need not be hidden_size / num_attention_heads.
    fields["head_dim"] = head_dim + 2
    sliding_window = window if flag else None
    return transformers.MistralConfig(**fields, sliding_window=sliding_window)
  windows = {
    "use_sliding_window": flag,
    "sliding_window": window,
    "max_window_layers": int(rng.integers(0, 4)),
  }
  if family == "qwen2":
    return transformers.Qwen2Config(**fields, **windows)
  return transformers.Qwen3Config(
    **fields,
    **windows,
    head_dim=head_dim + 4,
    attention_bias=bool(rng.integers(2)),
  )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_agree(golden, family, seed, tmp_path):
  import torch

  rng = np.random.default_rng([seed, len(family), ord(family[-1])])
  theirs = golden.build_model(_random_config(family, rng), seed)
  theirs.save_pretrained(tmp_path)
  tokens = rng.integers(3, 256, int(rng.integers(1, 180)), dtype=np.int64)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens[None]), use_cache=False).logits[0]

  ours = load_hf(tmp_path, make_mesh(1, 1), dtype="float32").dense()

  logits = testing.dense_logits(ours, tokens)
  np.testing.assert_allclose(
    logits, expected.numpy(), rtol=0, atol=tolerance("float32").logits
  )
