"""Makes the golden checkpoints and what `transformers` computes with them.

Runs in any environment with `transformers` and CPU `torch`, neither of which
the project itself needs:

    python tests/golden/make_golden.py [--only=llama3]

Each family gets a folder in the ordinary Hugging Face format, random float32
weights, and `expected.npz` with, for prompts `i = 0, 1, ...`:

    prompt_<i>     [T] int32
    positions_<i>  [R] int32, the rows of the prompt whose logits are kept
    logits_<i>     [R, V] float32
    greedy_<i>     [G] int32, the tokens that follow

Prompts are drawn until every greedy token wins by a wide margin, so that a test
may demand the same tokens from another implementation, and none ends the text.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import tokenizers
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
VOCAB_SIZE = 256
# Several rBlocks of 16 and of 64 tokens, partial ones, and less than one.
PROMPT_LENGTHS = (5, 64, 131, 200)
NUM_GREEDY = 20
MIN_MARGIN = 0.02

EOS_TOKEN_ID = 2

_SIZES = {
  "vocab_size": VOCAB_SIZE,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 4096,
  "bos_token_id": 1,
  "eos_token_id": EOS_TOKEN_ID,
}

FAMILIES = {
  "llama2": transformers.LlamaConfig(
    **_SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": False}
  ),
  "llama3": transformers.LlamaConfig(
    **_SIZES,
    tie_word_embeddings=True,
    # A context of 32 before the extension: at the tested lengths some
    # frequencies are kept, some blended and some divided.
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 500_000.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    },
  ),
  "mistral": transformers.MistralConfig(**_SIZES, sliding_window=None),
  "mistral_window": transformers.MistralConfig(**_SIZES, sliding_window=40),
  "qwen2": transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True),
  "qwen2_window": transformers.Qwen2Config(
    **_SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=1
  ),
  "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=32),
}
# Written in several files with an index, as large models are.
SHARDED = ("qwen2",)


def build_model(config, seed: int):
  """Builds a model with random weights that make every part of it matter.

  Args:
    config: A `transformers` configuration.
    seed: Decides all weights.

  Returns:
    The model, in evaluation mode and float32.
  """
  torch.manual_seed(seed)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "norm" in name:
        parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
      elif name.endswith("bias"):
        parameter.copy_(0.5 * torch.randn_like(parameter))
      elif "q_proj" in name or "k_proj" in name:
        # Sharp attention, so that a wrong position or mask shows.
        scale = 2.0 / parameter.shape[1] ** 0.5
        parameter.copy_(scale * torch.randn_like(parameter))
      else:
        # Also for embeddings: longer ones would outweigh the layers, and a
        # tied model would only repeat its last token.
        scale = 1.0 / parameter.shape[1] ** 0.5
        parameter.copy_(scale * torch.randn_like(parameter))
  return model


@torch.no_grad()
def greedy(model, prompt: np.ndarray, count: int) -> tuple[np.ndarray, float]:
  """Continues a prompt, recomputing it whole each time: no cache to trust.

  Args:
    model: A `transformers` model.
    prompt: `[T]` int32.
    count: Tokens to add.

  Returns:
    `[count]` int32, and the narrowest margin between best and second logit.
  """
  tokens = list(prompt)
  margin = float("inf")
  for _ in range(count):
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    best = torch.topk(logits, 2)
    margin = min(margin, float(best.values[0] - best.values[1]))
    tokens.append(int(best.indices[0]))
  return np.array(tokens[len(prompt) :], np.int32), margin


@torch.no_grad()
def expected(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Draws prompts with clear greedy continuations and records the outputs."""
  arrays = {}
  for i, length in enumerate(PROMPT_LENGTHS):
    while True:
      prompt = rng.integers(3, VOCAB_SIZE, length, dtype=np.int32)
      tokens, margin = greedy(model, prompt, NUM_GREEDY)
      if margin >= MIN_MARGIN and EOS_TOKEN_ID not in tokens:
        break
    logits = model(torch.tensor(prompt[None]), use_cache=False).logits[0]
    # A few rows from everywhere, the last one always.
    positions = np.unique(np.linspace(0, length - 1, 6).round().astype(int))
    arrays[f"prompt_{i}"] = prompt
    arrays[f"positions_{i}"] = positions.astype(np.int32)
    arrays[f"logits_{i}"] = logits[positions].numpy()
    arrays[f"greedy_{i}"] = tokens
  return arrays


def write_tokenizer(folder: pathlib.Path) -> None:
  """Writes a byte-level tokenizer of exactly `VOCAB_SIZE` entries."""
  special = ["<unk>", "<s>", "</s>"]
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = (special + alphabet)[:VOCAB_SIZE]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"
    )
  )
  tokenizer.add_special_tokens(special)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
  config = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% endfor %}",
  }
  text = json.dumps(config, indent=2) + "\n"
  (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
  """Makes the folders beside this file, or only one of them."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument("--only", choices=sorted(FAMILIES))
  only = parser.parse_args().only
  for seed, (name, config) in enumerate(FAMILIES.items()):
    if only not in (None, name):
      continue
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = build_model(config, seed)
    # The largest size of a file: "100KB" splits these models in several.
    model.save_pretrained(
      folder, max_shard_size="100KB" if name in SHARDED else "10GB"
    )
    write_tokenizer(folder)
    arrays = expected(model, np.random.default_rng(seed))
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(name, sorted(file.name for file in folder.iterdir()))


if __name__ == "__main__":
  main()
