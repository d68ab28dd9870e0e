"""Builders that tests share."""

import functools
import json
import math
import pathlib
import re
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from infinite_llm.engine.sampling import (
  SamplingKind,
  sample,
  sampling_arrays,
)
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import Attend, Transformer
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.effects import Move
from tests.recount import check_engine_books

if TYPE_CHECKING:
  from infinite_llm.engine.engine import Engine
  from infinite_llm.engine.outputs import RequestOutput

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Options of an engine with one program of each kind, to compile little.
SMALL_ENGINE = {
  "max_num_seqs": 4,
  "decode_buckets": (4,),
  "prefill_buckets": (32,),
  "group_prefill_buckets": (32,),
  "headroom_blocks": 0,
  "prefill_rows": 4,
  "spill_slots": 4,
  "exchange_blocks": 4,
  "resend_after_s": 0.01,
  "heartbeat_every_s": 0.005,
}


def round_kv(
  k: jax.Array,
  v: jax.Array,
  layer: int,
  kv_dtype: DTypeLike | None,
  kv_scales: np.ndarray | None,
) -> tuple[jax.Array, jax.Array]:
  """What a pool would give back of keys and values `[T, K, D]`.

  Args:
    k: Keys.
    v: Values.
    layer: Which layer they are of.
    kv_dtype: Of the pool; None leaves them as they are.
    kv_scales: `[L, 2, K]` of a pool of 8 bits, which divides by them, keeps to
      its largest number, and multiplies; None is 1.

  Returns:
    Keys and values, rounded.
  """
  if kv_dtype is None:
    return k, v
  if jnp.dtype(kv_dtype).itemsize > 1:
    return k.astype(kv_dtype), v.astype(kv_dtype)
  rounded = []
  for i, x in enumerate((k, v)):
    scale = jnp.float32(
      1.0 if kv_scales is None else kv_scales[layer, i][:, None]
    )
    limit = float(jnp.finfo(kv_dtype).max)
    x = jnp.clip(x.astype(jnp.float32) / scale, -limit, limit)
    rounded.append(x.astype(kv_dtype).astype(jnp.float32) * scale)
  return tuple(rounded)


def dense_attend(
  config: ModelConfig,
  positions: jax.Array,
  kv_dtype: DTypeLike | None = None,
  kv_scales: np.ndarray | None = None,
) -> Attend:
  """Attention of one sequence without a cache: the oracle of all others.

  Args:
    config: Gives each layer's window.
    positions: `[T]` int32, of the tokens that the model is called with.
    kv_dtype: Keys and values are rounded to it, as a pool would; None leaves
      them as they are.
    kv_scales: As of `round_kv`.

  Returns:
    An `attend` callback. A query sees the keys of the same call at its own and
    earlier positions, within its layer's window; the cache passes unchanged.
  """

  def attend(layer, q, k, v, cache):
    k, v = round_kv(k, v, layer, kv_dtype, kv_scales)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    visible = positions[None, :] <= positions[:, None]
    window = config.layer_window(layer)
    if window is not None:
      visible &= positions[None, :] > positions[:, None] - window
    scores = jnp.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v), cache

  return attend


def dense_logits(
  model: Transformer,
  tokens,
  positions=None,
  kv_dtype: DTypeLike | None = None,
  kv_scales: np.ndarray | None = None,
) -> jax.Array:
  """Runs a whole sequence densely, without any cache.

  Args:
    model: The model, whole or as a shard inside `jax.shard_map`.
    tokens: `[T]` int32.
    positions: `[T]` int32; None counts from 0.
    kv_dtype: As of `dense_attend`.
    kv_scales: As of `dense_attend`.

  Returns:
    `[T, V]` float32.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  if positions is None:
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  attend = dense_attend(model.config, positions, kv_dtype, kv_scales)
  hidden, _ = model(tokens, positions, None, attend)
  return model.logits(hidden)


def dense_greedy(model: Transformer, prompt, count: int) -> list[int]:
  """Continues a prompt greedily, recomputing it whole for each token.

  Args:
    model: The whole model.
    prompt: `[T]` token ids.
    count: Tokens to add.

  Returns:
    The `count` tokens that follow.
  """
  # One compilation: causality keeps the padding behind the end invisible.
  tokens = np.zeros(len(prompt) + count, np.int32)
  tokens[: len(prompt)] = prompt
  step = jax.jit(lambda t, row: jnp.argmax(dense_logits(model, t)[row]))
  for row in range(len(prompt) - 1, len(tokens) - 1):
    tokens[row + 1] = step(tokens, row)
  return tokens[len(prompt) :].tolist()


class GreedyOracle:
  """Dense, cache-free greedy decoding, compiled once for all lengths."""

  def __init__(
    self,
    model: Transformer,
    max_tokens: int,
    kv_dtype: DTypeLike | None = None,
    kv_scales: np.ndarray | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: The whole model.
      max_tokens: Longest sequence that will be asked for.
      kv_dtype: Dtype of the pool, if it is not the model's.
      kv_scales: As of `dense_attend`.
    """
    self._max_tokens = max_tokens

    def rows(tokens):
      logits = dense_logits(model, tokens, None, kv_dtype, kv_scales)
      top = jax.lax.top_k(logits, 2)
      return top[1][:, 0], top[0][:, 0] - top[0][:, 1]

    self._rows = jax.jit(rows)

  def first_difference(
    self, prompt: list[int], answer: list[int], tolerance: float
  ) -> str | None:
    """Compares an answer with what the model says, token for token.

    Args:
      prompt: Token ids.
      answer: Token ids that are said to follow greedily.
      tolerance: A different token is accepted, and the comparison ends there,
        where the two best logits are closer than this.

    Returns:
      What differs first, or None.
    """
    tokens = np.zeros(self._max_tokens, np.int32)
    tokens[: len(prompt) + len(answer)] = [*prompt, *answer]
    # Causality lets one pass check all tokens: each is judged given the ones
    # before it, which are equal up to the first difference.
    best, margin = (np.asarray(x) for x in self._rows(tokens))
    for i, token in enumerate(answer):
      row = len(prompt) + i - 1
      if token != best[row]:
        if margin[row] < tolerance:
          return None
        return (
          f"token {i} of the answer is {token}, the oracle says {best[row]}"
          f" by a margin of {margin[row]:.2e}"
        )
    return None


def random_bits(
  shape: Sequence[int], dtype: DTypeLike, seed: int = 0
) -> np.ndarray:
  """Random bits of numbers of a dtype, as unsigned integers of its size.

  Where bytes are compared: no two rBlocks, layers, heads or tokens are alike,
  and some numbers are NaNs, except in bfloat16 with any payload.
  """
  size = jnp.dtype(dtype).itemsize
  drawn = np.random.default_rng(seed).bytes(size * math.prod(shape))
  bits = np.frombuffer(drawn, f"u{size}").reshape(shape).copy()
  if jnp.dtype(dtype) == jnp.bfloat16:
    # XLA for CPUs updates arrays of it as float32: NaNs lose their payload.
    is_nan = np.isnan(bits.view(jnp.bfloat16))
    bits = np.where(is_nan, bits & 0x8000 | 0x7FC0, bits).astype("u2")
  return bits


def move(src: int, dst: int, number: int) -> Move:
  """Sends the rBlock `number` of one instance to another."""
  return Move(
    uid=7,
    logical_id=number,
    src_instance=src,
    src_block=number,
    src_tag=100 + number,
    dst_instance=dst,
    dst_block=50 + number,
    dst_epoch=200 + number,
    dst_tag=300 + number,
  )


def lockstep(array: jax.Array) -> bool:
  """For an engine's `is_ready`: all steps under way end together."""
  array.block_until_ready()
  return True


def drain(
  engine: "Engine", max_steps: int = 100_000
) -> dict[str, "RequestOutput"]:
  """Steps until all requests ended; recounts all rBlocks after every step.

  Args:
    engine: An engine with requests.
    max_steps: More are a failure.

  Returns:
    The last output of each request.
  """
  finished = {}
  for _ in range(max_steps):
    if not engine.has_unfinished():
      return finished
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output
    check_engine_books(engine)
  raise AssertionError(f"not done after {max_steps} steps")


def pools_are_empty(engine: "Engine", patience_s: float = 5.0) -> bool:
  """Whether every rBlock is free once the last messages are answered."""
  deadline = time.monotonic() + patience_s
  while time.monotonic() < deadline:
    engine.settle()
    if all(counts.free == counts.total for counts in engine.pool_counts()):
      return True
    time.sleep(0.001)
  return False


def write_shallow_checkpoint(
  folder: pathlib.Path,
  family: str = "llama3",
  num_layers: int = 1,
  num_kv_heads: int | None = None,
) -> pathlib.Path:
  """Cuts a golden model to its first layers: it compiles so much faster.

  Args:
    folder: Gets the checkpoint; made if need be.
    family: Golden checkpoint to take.
    num_layers: Layers to keep.
    num_kv_heads: KV heads to keep; None keeps all.

  Returns:
    The folder.
  """
  source = GOLDEN / family
  shutil.copytree(source, folder, dirs_exist_ok=True)
  config = json.loads((source / "config.json").read_text())
  config["num_hidden_layers"] = num_layers
  if "layer_types" in config:
    config["layer_types"] = config["layer_types"][:num_layers]
  if num_kv_heads is not None:
    config["num_key_value_heads"] = num_kv_heads
  (folder / "config.json").write_text(json.dumps(config))
  tensors = {}
  for file in source.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
    (folder / file.name).unlink()
  dropped = re.compile(r"model\.layers\.(\d+)\.")
  kept = {
    name: tensor
    for name, tensor in tensors.items()
    if (match := dropped.match(name)) is None or int(match[1]) < num_layers
  }
  if num_kv_heads is not None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rows = num_kv_heads * config.get("head_dim", head_dim)
    for name, tensor in kept.items():
      if re.search(r"\.[kv]_proj\.", name):
        kept[name] = np.ascontiguousarray(tensor[:rows])
  (folder / "model.safetensors.index.json").unlink(missing_ok=True)
  safetensors.numpy.save_file(kept, folder / "model.safetensors")
  return folder


class SamplingOracle:
  """Chooses tokens from dense, cache-free logits: any sampling, any model."""

  _MAX_ANSWER = 64

  def __init__(self, model: Transformer, max_tokens: int):
    """Compiles nothing yet.

    Args:
      model: The whole model.
      max_tokens: Longest sequence that will be asked for.
    """
    self._max_tokens = max_tokens
    self._logits = jax.jit(functools.partial(dense_logits, model))
    self._sample = jax.jit(
      functools.partial(sample, max_logprobs=0, kind=SamplingKind.CUT)
    )

  def logits(self, prompt: list[int], answer: Sequence[int]) -> np.ndarray:
    """`[len(answer), V]` float32: what each token was chosen from."""
    tokens = np.zeros(self._max_tokens, np.int32)
    end = len(prompt) + len(answer)
    tokens[:end] = [*prompt, *answer]
    return np.asarray(self._logits(tokens))[len(prompt) - 1 : end - 1]

  def tokens(
    self, prompt: list[int], answer: Sequence[int], sampling: SamplingParams
  ) -> list[int]:
    """Chooses each token of an answer anew, given those before it.

    Args:
      prompt: Token ids.
      answer: Token ids that are said to follow.
      sampling: How they were chosen; with a seed, if not greedily.

    Returns:
      What should be in the answer's place: equal to it, or different in the
      first token that is wrong.
    """
    count = len(answer)
    logits = self.logits(prompt, answer)
    logits = np.pad(logits, ((0, self._MAX_ANSWER - count), (0, 0)))
    seen = np.zeros(logits.shape, bool)
    rows = []
    for i in range(count):
      seen[i, [*prompt, *answer[:i]]] = True
      rows.append((sampling, sampling.seed or 0, len(prompt) + i))
    arrays = sampling_arrays(rows, self._MAX_ANSWER)
    return self._sample(logits, arrays, seen).token[:count].tolist()
