"""A Llama whose weights are written by a formula: it answers by looking back.

To continue a text it finds where its last two tokens stood before, at any
distance, and copies what followed them there; failing that, what followed its
last token. A marker sends it elsewhere: after `@amber` it copies what followed
`#amber`. So one prompt that ends in `@amber` reads a chain of needles

    The pass key of #amber is 481093; next is @cobalt.

hidden in any order, and greedy decoding gives ` is 481093; next is @cobalt is`
and so on. Every token of the answer hangs on one key and value of the context:
without the rBlock that holds it, the answer is wrong. No training is involved,
so this is the checkpoint that shows the system at work, in an ordinary Hugging
Face folder.

Construction (2 layers, 2 query heads of 64 dimensions, an idle MLP):

- *Codes.* Each token t has a code c(t): a shortest vector of the Leech lattice,
  24 small integers. Inner products are 32 with itself and at most 16 (at least
  -16) with any other: exact also in bfloat16. Its meaning is m(t) = c(t), but
  m(@name) = c(#name).
- *RoPE.* `rope_theta` is 1e32, so pair i of a head turns 10**-i radians a
  token. Pairs 0-7 tell distances apart; pairs 8-31 hardly turn (0.04 radians
  after 4M tokens), so their 48 dimensions compare content at any distance.
- *Layer 0* attends by distance alone: head 0 to the token before, whose code
  and meaning it copies, head 1 to the one before that, whose meaning it copies.
- *Layer 1*, head 0, compares 4 m(t_i) with c(t_{j-1}) and m(t_{i-1}) with
  m(t_{j-2}), and copies c(t_j), which the output layer turns into logits.
- After `END` the model ends its text: that token carries its answer itself.

Gaps, in nats, of the logit that should win over any other single one, computed
by distance (layer 0: all distances; layer 1: 200,000 draws of closest codes):

| where | near | 4M tokens | 16M tokens |
| --- | --- | --- | --- |
| layer 0, right distance over any other | 52 | 52 | 52 |
| layer 1, both tokens over the last alone | 64 | 57 | 39 |
| layer 1, the last token over the one before alone | 64 | 57 | 36 |
| output, right token over any other | 31 | 31 | 31 |

Bfloat16 keys cost layer 0 two nats and layer 1 less than one. Four million keys
that all match as well as the second best weigh ln(4M) = 15 nats together, which
leaves 42; 16 million leave 20. Beyond that pair 8 turns too far.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

from infinite_llm.models import needle_tokenizer
from infinite_llm.models.needle_tokenizer import (
  BOS_TOKEN,
  DEFAULT_VOCAB_SIZE,
  END,
  EOS_TOKEN,
)

HEAD_DIM = 64
HIDDEN_DIM = 192
NUM_LAYERS = 2
NUM_QUERY_HEADS = 2
ROPE_THETA = 1e32
CODE_DIM = 24

_MLP_DIM = 16
_FORMAT = 1  # Rises when the formula changes, so that old folders are rebuilt.
_RECIPE = "needle_recipe"  # Key in `config.json` of what a folder was made of.
_MAX_POSITION = 2**24  # See the table above.
_VOCAB_MULTIPLE = 64  # So that devices can split the vocabulary evenly.
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_FILES = (
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
)

# Dimensions of the residual stream.
_CONST = slice(0, 1)
_CODE = slice(8, 32)  # c(t_i)
_MEANING = slice(32, 56)  # m(t_i)
_LAST_CODE = slice(56, 80)  # c(t_{i-1})
_LAST_MEANING = slice(80, 104)  # m(t_{i-1})
_SECOND_LAST_MEANING = slice(104, 128)  # m(t_{i-2})
_OUT = slice(128, 152)  # Code of the token to come.
_FILL = slice(152, 160)  # Gives END the norm of all other tokens.
_SPARE = slice(160, 176)  # Always 0, as is _OTHER_SPARE.
_OTHER_SPARE = slice(176, 192)

# Dimensions of a head: rotary pair i is (i, i + 32).
_DISTANCE_PAIRS = 8
_FIRST_CONTENT = slice(8, 32)
_SECOND_CONTENT = slice(40, 64)

# The squared norms below make the RMS of the stream 2 before layer 0 and 6
# before layer 1, for every token; the norms' own weights are 1.
_CONST_VALUE = 24.0  # 24**2 + 2 * 32 + 8 * 4**2 == 192 * 2**2
_FILL_VALUE = 4.0
_LAST_GAIN = 8.0  # 192 * 2**2 + 3 * 32 * 8**2 == 192 * 6**2
_RMS = (2.0, 6.0)
_END_GAIN = 2.0  # 32 * 2**2 == 8 * 4**2
_OUT_GAIN = 0.5

_DISTANCE_LOGIT = 256.0  # What each pair adds at the right distance.
_LAST_WEIGHT = 128.0
_SECOND_LAST_WEIGHT = 32.0
_TOP_LOGIT = 64.0


def build_needle_checkpoint(
  path: str | os.PathLike[str],
  *,
  dtype: str = "float32",
  vocab_size: int = DEFAULT_VOCAB_SIZE,
  corpus: str | None = None,
) -> pathlib.Path:
  """Writes the needle checkpoint as a Hugging Face Llama folder.

  A folder that was built with the same arguments is left as it is. The folder
  appears in one piece, so a builder that dies or races leaves none half made.

  Args:
    path: Folder to write; may hold an earlier needle checkpoint.
    dtype: "float32" or "bfloat16".
    vocab_size: Most tokens of the tokenizer.
    corpus: Text that the tokenizer learns from; None takes CPython's topic
      texts, the empty string gives a byte tokenizer.

  Returns:
    `path`.

  Raises:
    ValueError: An argument is out of range, or `path` holds something else.
  """
  path = pathlib.Path(path)
  if dtype not in _DTYPES:
    raise ValueError(
      f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}."
    )
  if corpus is None:
    corpus = needle_tokenizer.default_corpus()
  recipe = _recipe(_FORMAT, dtype, vocab_size, corpus)
  found = _find_recipe(path)
  if found == recipe:
    return path
  if found is None and path.exists() and any(path.iterdir()):
    raise ValueError(
      "path must be empty or hold a needle checkpoint;"
      f" {str(path)!r} holds other files."
    )

  tokenizer = needle_tokenizer.build_needle_tokenizer(
    vocab_size=vocab_size, corpus=corpus
  )
  rows = -(-tokenizer.get_vocab_size() // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
  weights = _weights(tokenizer, rows)
  tokens = {
    "bos_token_id": tokenizer.token_to_id(BOS_TOKEN),
    "eos_token_id": tokenizer.token_to_id(EOS_TOKEN),
  }
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": rows,
    "hidden_size": HIDDEN_DIM,
    "intermediate_size": _MLP_DIM,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_QUERY_HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": ROPE_THETA,
    "rope_scaling": None,
    "max_position_embeddings": _MAX_POSITION,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    **tokens,
    _RECIPE: recipe,
  }
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS_TOKEN,
    "eos_token": EOS_TOKEN,
    "clean_up_tokenization_spaces": False,
    "model_max_length": _MAX_POSITION,
  }

  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=path.parent, prefix=f".{path.name}-"
  ) as scratch:
    new = pathlib.Path(scratch, "new")
    new.mkdir()
    _write_json(new / "config.json", config)
    _write_json(new / "generation_config.json", {"do_sample": False, **tokens})
    _write_json(new / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(new / "tokenizer.json"))
    safetensors.numpy.save_file(
      {name: w.astype(_DTYPES[dtype]) for name, w in weights.items()},
      new / "model.safetensors",
      metadata={"format": "np"},
    )
    if found is not None:
      shutil.move(path, pathlib.Path(scratch, "old"))
    try:
      new.rename(path)
    except OSError:
      # Somebody else was first; fine if it is the same checkpoint.
      if _find_recipe(path) != recipe:
        raise
  return path


def token_codes(vocab_size: int) -> np.ndarray:
  """Gives every token a shortest vector of the Leech lattice.

  Those used here have the signs of a codeword of the extended Golay code, with
  one entry of size 3 and opposite sign (J. H. Conway and N. J. A. Sloane,
  "Sphere Packings, Lattices and Groups", chapter 4, section 11). Codewords that
  begin with 1 are left out: they would give the negatives of the others.

  Args:
    vocab_size: How many, at most 49152.

  Returns:
    `[vocab_size, 24]` float32, entries 1 or 3 in size. Inner products are 32 on
    the diagonal and in {-16, -8, 0, 8, 16} elsewhere.

  Raises:
    ValueError: There are not that many.
  """
  # The Golay code is cyclic: multiples of this polynomial, plus a parity bit.
  generator = (1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1)
  basis = np.zeros((11, CODE_DIM), np.int64)
  for shift in range(11):
    basis[shift, shift + 1 : shift + 13] = generator
  basis[:, 23] = basis.sum(axis=1) % 2
  messages = np.arange(2**11)[:, None] >> np.arange(11) & 1
  signs = 1.0 - 2.0 * (messages @ basis % 2)

  most = CODE_DIM * len(signs)
  if not 0 < vocab_size <= most:
    raise ValueError(f"vocab_size must be in [1, {most}]; got {vocab_size}.")
  tokens = np.arange(vocab_size)
  codes = signs[tokens % len(signs)]
  codes[tokens, tokens // len(signs)] *= -3.0
  return codes.astype(np.float32)


def _weights(
  tokenizer: tokenizers.Tokenizer, vocab_size: int
) -> dict[str, np.ndarray]:
  """Returns all tensors by their Hugging Face names, float32, `[out, in]`."""
  codes = token_codes(vocab_size)
  meanings = codes.copy()
  for name in needle_tokenizer.NAMES:
    marker = needle_tokenizer.reference(name)
    defined = tokenizer.token_to_id(needle_tokenizer.definition(name))
    for text in (marker, f" {marker}"):
      meanings[tokenizer.token_to_id(text)] = codes[defined]

  embedding = np.zeros((vocab_size, HIDDEN_DIM), np.float32)
  embedding[:, _CONST] = _CONST_VALUE
  embedding[:, _CODE] = codes
  embedding[:, _MEANING] = meanings
  embedding[:, _FILL] = _FILL_VALUE
  end = tokenizer.token_to_id(END)
  embedding[end, _FILL] = 0.0
  embedding[end, _OUT] = _END_GAIN * codes[tokenizer.token_to_id(EOS_TOKEN)]

  # The right token's code reaches the output as `_OUT_GAIN * c`, |c|**2 = 32.
  head = np.zeros((vocab_size, HIDDEN_DIM), np.float32)
  head[:, _OUT] = codes * (_TOP_LOGIT * _RMS[1] / (_OUT_GAIN * 32.0))
  # Where several tokens followed equally often, rounding would choose: let a
  # preference below one nat do so, spread evenly by the golden ratio.
  preference = np.arange(vocab_size) * 0.6180339887498949 % 1.0
  head[:, _CONST] = preference[:, None] * (_RMS[1] / _CONST_VALUE)

  weights = {
    "model.embed_tokens.weight": embedding,
    "model.norm.weight": np.ones(HIDDEN_DIM, np.float32),
    "lm_head.weight": head,
  }
  attention = (_distance_layer(), _content_layer())
  for layer, (q, k, v, o) in enumerate(attention):
    prefix = f"model.layers.{layer}"
    weights |= {
      f"{prefix}.self_attn.q_proj.weight": q,
      f"{prefix}.self_attn.k_proj.weight": k,
      f"{prefix}.self_attn.v_proj.weight": v,
      f"{prefix}.self_attn.o_proj.weight": o,
    }
    # The format wants an MLP. This one adds nothing, as its input is 0. Zero
    # weights would do too, but XLA for CPUs (jaxlib 0.11.2) was seen to return
    # NaN where a fused program had them as constants.
    gate = np.zeros((_MLP_DIM, HIDDEN_DIM), np.float32)
    gate[:, _SPARE] = np.eye(_MLP_DIM)
    down = np.zeros((HIDDEN_DIM, _MLP_DIM), np.float32)
    down[_OTHER_SPARE] = np.eye(_MLP_DIM)
    weights |= {
      f"{prefix}.mlp.gate_proj.weight": gate,
      f"{prefix}.mlp.up_proj.weight": gate.copy(),
      f"{prefix}.mlp.down_proj.weight": down,
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
      weights[f"{prefix}.{name}.weight"] = np.ones(HIDDEN_DIM, np.float32)
  return weights


def _distance_layer() -> tuple[np.ndarray, ...]:
  """Layer 0: head h copies the token h + 1 back. Returns q, k, v, o."""
  q, k, v, o = _empty_layer()
  const = _CONST_VALUE / _RMS[0]
  amplitude = np.sqrt(_DISTANCE_LOGIT * HEAD_DIM**0.5)
  pairs = np.arange(_DISTANCE_PAIRS)
  radians_per_token = ROPE_THETA ** (-2.0 * pairs / HEAD_DIM)
  # A constant key, and a query turned back: they align where RoPE has turned
  # the query `distance` tokens further than the key.
  k[pairs, _CONST] = amplitude / const
  for head in range(NUM_QUERY_HEADS):
    angle = -radians_per_token * (head + 1)
    first = head * HEAD_DIM + pairs
    q[first, 0] = amplitude / const * np.cos(angle)
    q[first + HEAD_DIM // 2, 0] = amplitude / const * np.sin(angle)

  eye = np.eye(CODE_DIM, dtype=np.float32)
  v[_FIRST_CONTENT, _CODE] = _RMS[0] * eye
  v[_SECOND_CONTENT, _MEANING] = _RMS[0] * eye
  o[_LAST_CODE, _FIRST_CONTENT] = _LAST_GAIN * eye
  o[_LAST_MEANING, _SECOND_CONTENT] = _LAST_GAIN * eye
  second_head = slice(
    HEAD_DIM + _SECOND_CONTENT.start, HEAD_DIM + _SECOND_CONTENT.stop
  )
  o[_SECOND_LAST_MEANING, second_head] = _LAST_GAIN * eye
  return q, k, v, o


def _content_layer() -> tuple[np.ndarray, ...]:
  """Layer 1: head 0 copies what followed the last tokens before."""
  q, k, v, o = _empty_layer()
  eye = np.eye(CODE_DIM, dtype=np.float32)
  own = _RMS[1]  # Undoes the norm for a token's own code,
  last = _RMS[1] / _LAST_GAIN  # and for what layer 0 has written.
  q[_FIRST_CONTENT, _MEANING] = _LAST_WEIGHT * own * eye
  q[_SECOND_CONTENT, _LAST_MEANING] = _SECOND_LAST_WEIGHT * last * eye
  k[_FIRST_CONTENT, _LAST_CODE] = last * eye
  k[_SECOND_CONTENT, _SECOND_LAST_MEANING] = last * eye
  v[_FIRST_CONTENT, _CODE] = own * eye
  o[_OUT, _FIRST_CONTENT] = _OUT_GAIN * eye
  return q, k, v, o


def _empty_layer() -> tuple[np.ndarray, ...]:
  """Returns zero q `[H * D, E]`, k, v `[D, E]`, o `[E, H * D]`, E = hidden."""
  width = NUM_QUERY_HEADS * HEAD_DIM
  return (
    np.zeros((width, HIDDEN_DIM), np.float32),
    np.zeros((HEAD_DIM, HIDDEN_DIM), np.float32),
    np.zeros((HEAD_DIM, HIDDEN_DIM), np.float32),
    np.zeros((HIDDEN_DIM, width), np.float32),
  )


def _recipe(*ingredients: object) -> str:
  return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def _find_recipe(path: pathlib.Path) -> str | None:
  """Returns what the folder was built of; "" if files are missing since.

  None says that it is no needle checkpoint at all, or does not exist.
  """
  try:
    recipe = json.loads((path / "config.json").read_text())[_RECIPE]
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return recipe if all((path / name).is_file() for name in _FILES) else ""


def _write_json(path: pathlib.Path, value: object) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
