"""Chooses the next token of each row: one pure function of logits.

The order is that of vLLM's V1 sampler, so that the same `SamplingParams` mean
the same distribution there and here:

1. the reported log-probabilities are of the logits as the model gave them;
2. the repetition penalty, for greedy rows too;
3. greedy rows (temperature 0) take the best token, the lowest id of equals;
4. the others divide by the temperature, then drop tokens by min_p, by top_k and
   by top_p, each of what the one before has left;
5. and draw from what remains.

A draw takes its noise from (seed, position) and the token id alone: the same
row gives the same token again, in whichever batch, bucket or instance.

Whether to draw at all, and whether to sort the vocabulary, which costs more
than all the rest, the host decides, for all rows of a step: on a GPU it would
wait for a condition that the device computes.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infinite_llm.sampling_params import SamplingParams

NO_TOKEN = 2**31 - 1
"""In place of a token where the logits are no distribution.

It lies past every vocabulary, so that it cannot be taken for a token and a
scatter with `mode="drop"` ignores it.
"""


class SamplingKind(enum.Enum):
  """How much a sampling program can do; a row gets the same of all that serve.

  Values are names of programs.
  """

  GREEDY = "sample_greedy"
  """The best token, without log-probabilities of others."""
  DRAWN = "sample_drawn"
  """All but top_k and top_p of rows that draw."""
  CUT = "sample_cut"
  """All there is; sorts the vocabulary."""

  @classmethod
  def for_rows(cls, rows: Iterable[SamplingParams]) -> "SamplingKind":
    """The kind that does least among those that serve all rows."""
    kind = cls.GREEDY
    for row in rows:
      if not row.is_greedy and (row.top_k > 0 or row.top_p < 1):
        return cls.CUT
      if not _is_plain_greedy(row):
        kind = cls.DRAWN
    return kind


class SamplingArrays(NamedTuple):
  """How to choose the token of each row.

  Attributes:
    temperature: `[B]` float32. 0 is greedy.
    top_k: `[B]` int32. 0 keeps all tokens.
    top_p: `[B]` float32. 1 keeps all tokens.
    min_p: `[B]` float32. 0 keeps all tokens.
    repetition_penalty: `[B]` float32. 1 changes nothing.
    seed: `[B]` uint32. Seed of the row's request.
    position: `[B]` int32. Position of the token to be chosen.
  """

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  min_p: jax.Array | np.ndarray
  repetition_penalty: jax.Array | np.ndarray
  seed: jax.Array | np.ndarray
  position: jax.Array | np.ndarray


class Sampled(NamedTuple):
  """The chosen tokens, and what the model thought of them.

  Log-probabilities are natural and of the model's own distribution, the
  log-softmax of the logits before any penalty, temperature or filter (what vLLM
  calls "raw_logprobs", its default).

  Attributes:
    token: `[B]` int32. `NO_TOKEN` if the row's logits have a NaN or a positive
      infinity, or are all minus infinity.
    logprob: `[B]` float32, of the token; NaN beside `NO_TOKEN`.
    top_ids: `[B, max_logprobs]` int32. The most likely tokens, best first.
    top_logprobs: `[B, max_logprobs]` float32, of those.
  """

  token: jax.Array
  logprob: jax.Array
  top_ids: jax.Array
  top_logprobs: jax.Array


def sampling_arrays(
  rows: Sequence[tuple[SamplingParams, int, int]], bucket: int
) -> SamplingArrays:
  """Gathers the parameters of a batch on the host.

  Args:
    rows: `(params, seed, position)` of each row.
    bucket: B. Rows beyond those given are greedy.

  Returns:
    Numpy arrays over `[B]`.

  Raises:
    ValueError: There are more rows than the bucket takes.
  """
  if len(rows) > bucket:
    raise ValueError(
      f"rows must be at most bucket ({bucket}) many; got {len(rows)}."
    )
  padding = [(SamplingParams(), 0, 0)] * (bucket - len(rows))
  params, seeds, positions = zip(*rows, *padding, strict=True)
  float32 = np.float32
  return SamplingArrays(
    temperature=np.array([p.temperature for p in params], float32),
    top_k=np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
    top_p=np.array([p.top_p for p in params], float32),
    min_p=np.array([p.min_p for p in params], float32),
    repetition_penalty=np.array(
      [p.repetition_penalty for p in params], float32
    ),
    seed=np.array(seeds, np.uint32),
    position=np.array(positions, np.int32),
  )


def sample(
  logits: jax.Array,
  arrays: SamplingArrays,
  seen: jax.Array,
  *,
  max_logprobs: int,
  kind: SamplingKind,
) -> Sampled:
  """Chooses one token per row.

  Args:
    logits: `[B, V]` float32. Minus infinity forbids a token.
    arrays: How to choose.
    seen: `[B, V]` bool. Tokens that the prompt or the output already has; read
      where the repetition penalty is not 1.
    max_logprobs: Most likely tokens to report, at most V. Static.
    kind: What the program can do; one that serves all rows. Static.

  Returns:
    The tokens and their log-probabilities.
  """
  log_total = jax.nn.logsumexp(logits, axis=-1)
  penalised = _penalise(logits, seen, arrays.repetition_penalty)
  token = jnp.argmax(penalised, axis=-1)
  if kind is not SamplingKind.GREEDY:
    drawn = _draw(penalised, arrays, kind is SamplingKind.CUT)
    token = jnp.where(arrays.temperature == 0, token, drawn)

  # A NaN in any logit, or no finite one, is a NaN or infinity of the total.
  is_sound = jnp.isfinite(log_total)
  own = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  top, top_ids = jax.lax.top_k(logits, max_logprobs)
  return Sampled(
    token=jnp.where(is_sound, token, NO_TOKEN).astype(jnp.int32),
    logprob=jnp.where(is_sound, own - log_total, jnp.nan),
    top_ids=top_ids.astype(jnp.int32),
    top_logprobs=top - log_total[:, None],
  )


def _is_plain_greedy(row: SamplingParams) -> bool:
  return row.is_greedy and row.repetition_penalty == 1 and row.logprobs is None


def _penalise(
  logits: jax.Array, seen: jax.Array, penalty: jax.Array
) -> jax.Array:
  """Makes seen tokens less likely (CTRL, arXiv 1909.05858, section 4.1).

  Args:
    logits: `[B, V]` float32.
    seen: `[B, V]` bool.
    penalty: `[B]` float32.

  Returns:
    `[B, V]` float32.
  """
  penalty = penalty[:, None]
  penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, penalised, logits)


def _draw(
  logits: jax.Array, arrays: SamplingArrays, has_cuts: bool
) -> jax.Array:
  """Draws a token from each row, by the Gumbel trick.

  Args:
    logits: `[B, V]` float32, penalised.
    arrays: How to choose. Rows of temperature 0 give any token.
    has_cuts: Whether a row may have top_k or top_p. Static.

  Returns:
    `[B]` int32.
  """
  # With the best logit at 0 no temperature, however small, overflows.
  best = jnp.max(logits, axis=-1, keepdims=True)
  tiny = jnp.finfo(jnp.float32).tiny
  scaled = (logits - best) / jnp.maximum(arrays.temperature, tiny)[:, None]
  # The best token weighs exp(0), so min_p compares with 1.
  scaled = _keep(scaled, scaled >= jnp.log(arrays.min_p)[:, None])
  if has_cuts:
    scaled = _keep_top(scaled, arrays.top_k, arrays.top_p)
  return jnp.argmax(scaled + _noise(arrays, logits.shape[-1]), axis=-1)


def _keep_top(
  scaled: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
  """Drops tokens by top_k, then by top_p of what is left.

  Both are cuts at a logit: tokens that equal the last one kept are kept too.

  Args:
    scaled: `[B, V]` float32.
    top_k: `[B]` int32.
    top_p: `[B]` float32.

  Returns:
    `[B, V]` float32, minus infinity where a token was dropped.
  """
  vocab_size = scaled.shape[-1]
  falling = -jnp.sort(-scaled, axis=-1)
  top_k = jnp.where(top_k == 0, vocab_size, jnp.minimum(top_k, vocab_size))
  cut_k = jnp.take_along_axis(falling, top_k[:, None] - 1, axis=-1)
  falling = _keep(falling, falling >= cut_k)

  # A token stays while those before it have not reached top_p; the first one
  # always does. Rounding must not let a sum reach 1 before the end.
  probs = jax.nn.softmax(falling, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  stays = (before < top_p[:, None]) | (top_p[:, None] >= 1)
  stays = stays.at[:, 0].set(True)
  count = jnp.sum(stays, axis=-1, keepdims=True)
  cut_p = jnp.take_along_axis(falling, count - 1, axis=-1)
  return _keep(scaled, (scaled >= cut_k) & (scaled >= cut_p))


def _noise(arrays: SamplingArrays, vocab_size: int) -> jax.Array:
  """Returns `[B, V]` float32 Gumbel noise of (seed, position, token id)."""

  def row(seed: jax.Array, position: jax.Array) -> jax.Array:
    # The generator is named: a changed default of JAX changes no answer.
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(key, position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)

  return jax.vmap(row)(arrays.seed, arrays.position)


def _keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
  return jnp.where(kept, logits, -jnp.inf)
