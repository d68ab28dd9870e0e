"""The sampler against small oracles in NumPy, and its draws against chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.engine import sampling
from infinite_llm.engine.sampling import (
  NO_TOKEN,
  SamplingKind,
  sampling_arrays,
)
from infinite_llm.sampling_params import SamplingParams

_sample = functools.partial(jax.jit, static_argnames=("max_logprobs", "kind"))(
  sampling.sample
)


def _choose(
  logits, params, *, seeds=None, positions=None, seen=None, max_logprobs=0,
  kind=SamplingKind.CUT,
):  # fmt: skip
  """Samples rows; one value of params, seed or position serves them all."""
  logits = jnp.asarray(logits, jnp.float32)
  count = len(logits)
  params = params if isinstance(params, list) else [params] * count
  seeds = [0] * count if seeds is None else seeds
  positions = [0] * count if positions is None else positions
  rows = list(zip(params, seeds, positions, strict=True))
  seen = np.zeros(logits.shape, bool) if seen is None else seen
  result = _sample(
    logits,
    sampling_arrays(rows, count),
    seen,
    max_logprobs=max_logprobs,
    kind=kind,
  )
  return jax.tree.map(np.asarray, result)


def _oracle(logits, params, seen):
  """Probabilities of one row in float64, one token after the other."""
  scores = [float(x) for x in logits]
  for token, is_seen in enumerate(seen):
    if is_seen and scores[token] > 0:
      scores[token] /= params.repetition_penalty
    elif is_seen:
      scores[token] *= params.repetition_penalty
  weights = np.exp(
    (np.array(scores) - max(scores)) / np.float64(params.temperature)
  )
  weights[weights < params.min_p * weights.max()] = 0
  order = sorted(range(len(weights)), key=lambda n: -weights[n])
  if params.top_k:
    weights[order[params.top_k :]] = 0
  weights /= weights.sum()
  reached = 0.0
  for token in order:
    if reached >= params.top_p:
      weights[token] = 0
    reached += weights[token]
  return weights / weights.sum()


class TestSamplingArrays:
  def test_rows_keep_their_order_and_padding_is_greedy(self):
    first = SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125)
    second = SamplingParams(temperature=2.0, repetition_penalty=1.5)
    arrays = sampling_arrays([(first, 2**32 - 1, 7), (second, 5, 9)], 4)
    np.testing.assert_array_equal(arrays.temperature, [0.5, 2, 0, 0])
    np.testing.assert_array_equal(arrays.top_k, [3, 0, 0, 0])
    np.testing.assert_array_equal(arrays.top_p, [0.25, 1, 1, 1])
    np.testing.assert_array_equal(arrays.min_p, [0.125, 0, 0, 0])
    np.testing.assert_array_equal(arrays.repetition_penalty, [1, 1.5, 1, 1])
    np.testing.assert_array_equal(arrays.seed, [2**32 - 1, 5, 0, 0])
    np.testing.assert_array_equal(arrays.position, [7, 9, 0, 0])

  def test_an_empty_batch_is_all_padding(self):
    assert sampling_arrays([], 2).top_p.tolist() == [1, 1]

  def test_more_rows_than_the_bucket_are_refused(self):
    rows = [(SamplingParams(), 0, 0)] * 3
    with pytest.raises(ValueError, match=r"at most bucket \(2\) many; got 3"):
      sampling_arrays(rows, 2)


@pytest.mark.parametrize("kind", SamplingKind)
class TestGreedy:
  def test_takes_the_best_token(self, kind):
    logits = np.random.default_rng(0).normal(size=(8, 50))
    result = _choose(logits, SamplingParams(), kind=kind)
    np.testing.assert_array_equal(result.token, logits.argmax(-1))

  def test_takes_the_lowest_id_of_equals(self, kind):
    logits = np.zeros((1, 300))
    logits[0, [17, 41, 299]] = 2.5
    result = _choose(logits, SamplingParams(), kind=kind)
    assert result.token.tolist() == [17]

  def test_ignores_filters(self, kind):
    params = SamplingParams(top_k=1, top_p=0.1, min_p=1.0, seed=3)
    result = _choose([[1.0, 3.0, 2.0]], params, kind=kind)
    assert result.token.tolist() == [1]

  def test_penalises_seen_tokens(self, kind):
    # 3.0 / 2 < 2.0 and -0.5 * 2 < -0.75: the penalty moves both down.
    logits = [[3.0, 2.0, -1.0], [-9.0, -0.5, -0.75]]
    seen = np.array([[True, False, False], [False, True, False]])
    params = SamplingParams(repetition_penalty=2.0)
    result = _choose(logits, params, seen=seen, kind=kind)
    assert result.token.tolist() == [1, 2]


class TestDistribution:
  @pytest.mark.parametrize(
    "params",
    [
      SamplingParams(temperature=1.0),
      SamplingParams(temperature=0.5),
      SamplingParams(temperature=2.0, top_k=3),
      SamplingParams(temperature=1.0, top_p=0.7),
      SamplingParams(temperature=1.5, min_p=0.2),
      SamplingParams(temperature=1.0, repetition_penalty=1.7),
      SamplingParams(
        temperature=1.2,
        top_k=5,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.3,
      ),
    ],
    ids=["plain", "cold", "top_k", "top_p", "min_p", "penalty", "all"],
  )
  def test_draws_follow_the_oracle(self, params):
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=1.5, size=12).astype(np.float32)
    seen = rng.random(12) < 0.3
    wanted = _oracle(logits, params, seen)
    draws = 4000
    result = _choose(
      np.tile(logits, (draws, 1)),
      params,
      positions=range(draws),
      seen=np.tile(seen, (draws, 1)),
    )
    found = np.bincount(result.token, minlength=12) / draws
    assert not found[wanted == 0].any()
    # Four standard deviations of a binomial share.
    slack = 4 * np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(found - wanted) <= slack + 1e-9).all(), (found, wanted)

  def test_kept_tokens_are_those_of_the_oracle(self):
    rng = np.random.default_rng(2)
    for _ in range(200):
      logits = rng.normal(scale=2, size=(1, 16)).astype(np.float32)
      params = SamplingParams(
        temperature=rng.uniform(0.3, 3),
        top_k=int(rng.integers(0, 20)),
        top_p=rng.uniform(0.05, 1),
        min_p=rng.choice([0, rng.uniform(0, 0.5)]),
      )
      arrays = sampling_arrays([(params, 0, 0)], 1)
      scaled = (logits - logits.max()) / arrays.temperature
      scaled = np.where(scaled >= np.log(arrays.min_p + 1e-38), scaled, -np.inf)
      kept = np.isfinite(
        sampling._keep_top(jnp.asarray(scaled), arrays.top_k, arrays.top_p)
      )
      wanted = _oracle(logits[0], params, np.zeros(16, bool)) > 0
      np.testing.assert_array_equal(kept[0], wanted, err_msg=str(params))

  def test_a_small_top_p_keeps_the_best_token(self):
    params = SamplingParams(temperature=5.0, top_p=1e-6)
    logits = np.tile([0.0, 0.1, 0.0], (64, 1))
    result = _choose(logits, params, positions=range(64))
    assert set(result.token.tolist()) == {1}

  def test_equals_of_the_last_token_kept_are_kept(self):
    params = SamplingParams(temperature=1.0, top_k=1)
    logits = np.tile([1.0, 2.0, 2.0], (64, 1))
    result = _choose(logits, params, positions=range(64))
    assert set(result.token.tolist()) == {1, 2}

  def test_top_k_beyond_the_vocabulary_keeps_all(self):
    params = SamplingParams(temperature=1.0, top_k=2**40)
    result = _choose(np.zeros((64, 3)), params, positions=range(64))
    assert set(result.token.tolist()) == {0, 1, 2}

  def test_a_forbidden_token_is_never_drawn(self):
    logits = np.tile([-np.inf, 0.0, -np.inf, 0.0], (128, 1))
    params = SamplingParams(temperature=100.0, repetition_penalty=3.0)
    result = _choose(
      logits, params, positions=range(128), seen=np.ones(logits.shape, bool)
    )
    assert set(result.token.tolist()) == {1, 3}

  @pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45])
  def test_a_vanishing_temperature_is_the_best_token(self, temperature):
    params = SamplingParams(temperature=temperature)
    result = _choose([[3.0, 90.0, -80.0]], params)
    assert result.token.tolist() == [1]
    assert np.isfinite(result.logprob).all()


class TestKinds:
  @pytest.mark.parametrize(
    ("kind", "rows"),
    [
      (SamplingKind.GREEDY, []),
      (SamplingKind.GREEDY, [{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.5}]),
      (SamplingKind.DRAWN, [{}, {"repetition_penalty": 1.1}]),
      (SamplingKind.DRAWN, [{"logprobs": 0}]),
      (SamplingKind.DRAWN, [{"top_k": 3}, {"temperature": 1, "min_p": 0.5}]),
      (SamplingKind.CUT, [{}, {"temperature": 1, "top_k": 3}]),
      (SamplingKind.CUT, [{"temperature": 1e-9, "top_p": 0.9}, {}]),
    ],
  )
  def test_a_step_takes_the_least_that_serves_its_rows(self, kind, rows):
    rows = [SamplingParams(**row) for row in rows]
    assert SamplingKind.for_rows(rows) is kind
    assert SamplingKind.for_rows(reversed(rows)) is kind

  def test_a_row_gives_the_same_in_all_that_serve_it(self):
    rng = np.random.default_rng(5)
    count = 400
    logits = rng.normal(scale=3, size=(count, 500)).astype(np.float32)
    logits[:, ::7] = logits[:, 1::7][:, : logits[:, ::7].shape[1]]  # Ties.
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    params = [
      SamplingParams(
        temperature=rng.choice([0, 1e-40, 0.3, 1.0, 2.5]),
        min_p=rng.choice([0, 0.01, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.4]),
        logprobs=3,
      )
      for _ in range(count)
    ]
    given = {
      "seeds": rng.integers(0, 2**32, count),
      "positions": rng.integers(0, 2**31 - 1, count),
      "seen": rng.random(logits.shape) < 0.2,
      "max_logprobs": 3,
    }
    drawn = _choose(logits, params, kind=SamplingKind.DRAWN, **given)
    # Others have cuts beside them in the same step.
    mixed = list(params)
    mixed[::3] = [
      SamplingParams(temperature=1.0, top_k=2, top_p=0.4) for _ in mixed[::3]
    ]
    uncut = np.arange(count) % 3 > 0
    greedy = np.array([p.is_greedy for p in params])
    for other, rows in (
      (_choose(logits, params, kind=SamplingKind.CUT, **given), uncut >= 0),
      (_choose(logits, mixed, kind=SamplingKind.CUT, **given), uncut),
      (_choose(logits, params, kind=SamplingKind.GREEDY, **given), greedy),
    ):
      for field, expected in zip(other, drawn, strict=True):
        np.testing.assert_array_equal(
          field[rows].view(np.int32), expected[rows].view(np.int32)
        )


class TestRepeatability:
  def test_a_row_gives_the_same_token_in_any_row_and_bucket(self):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(6, 200)).astype(np.float32)
    params = [
      SamplingParams(temperature=1.0),
      SamplingParams(temperature=0.8, top_k=20),
      SamplingParams(temperature=1.3, top_p=0.9),
      SamplingParams(temperature=1.0, min_p=0.05),
      SamplingParams(),
      SamplingParams(temperature=2.0, top_k=50, top_p=0.5),
    ]
    seeds = rng.integers(0, 2**32, 6)
    positions = rng.integers(0, 2**31 - 1, 6)
    alone = [
      _choose(
        logits[n : n + 1], params[n], seeds=seeds[[n]], positions=positions[[n]]
      ).token[0]
      for n in range(6)
    ]
    for bucket in (6, 16, 33):
      where = rng.permutation(bucket)[:6]
      batch = rng.normal(size=(bucket, 200)).astype(np.float32)
      others = [SamplingParams(temperature=1.0)] * bucket
      batch_seeds = rng.integers(0, 2**32, bucket)
      batch_positions = rng.integers(0, 2**31 - 1, bucket)
      for n, row in enumerate(where):
        batch[row], others[row] = logits[n], params[n]
        batch_seeds[row], batch_positions[row] = seeds[n], positions[n]
      result = _choose(
        batch, others, seeds=batch_seeds, positions=batch_positions
      )
      np.testing.assert_array_equal(result.token[where], alone)

  def test_draws_differ_by_seed_and_by_position(self):
    logits = np.zeros((50, 10_000))
    params = SamplingParams(temperature=1.0)
    by_position = _choose(logits, params, positions=range(50)).token
    by_seed = _choose(logits, params, seeds=range(50)).token
    assert len(set(by_position.tolist())) > 45
    assert len(set(by_seed.tolist())) > 45
    # (seed, position) and (position, seed) are different pairs.
    assert by_position[1:].tolist() != by_seed[1:].tolist()

  def test_draws_are_those_recorded(self):
    params = SamplingParams(temperature=1.0)
    result = _choose(
      np.zeros((4, 1000)), params, seeds=[0, 1, 2**31, 2**32 - 1],
      positions=[0, 7, 2**20, 2**31 - 1],
    )  # fmt: skip
    assert result.token.tolist() == [737, 883, 639, 602]


class TestLogprobs:
  def test_are_of_the_logits_before_penalty_temperature_and_filters(self):
    rng = np.random.default_rng(4)
    logits = rng.normal(scale=3, size=(5, 40)).astype(np.float32)
    params = SamplingParams(
      temperature=0.3, top_k=2, repetition_penalty=4.0, logprobs=4
    )
    result = _choose(
      logits, params, seen=rng.random(logits.shape) < 0.5, max_logprobs=4
    )
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    rows = np.arange(5)
    np.testing.assert_allclose(
      result.logprob, wanted[rows, result.token], atol=1e-5
    )
    order = np.argsort(-wide, axis=-1)[:, :4]
    np.testing.assert_array_equal(result.top_ids, order)
    np.testing.assert_allclose(
      result.top_logprobs, wanted[rows[:, None], order], atol=1e-5
    )

  def test_no_logprobs_have_no_columns(self):
    result = _choose(np.zeros((2, 3)), SamplingParams(), max_logprobs=0)
    assert result.top_ids.shape == result.top_logprobs.shape == (2, 0)


class TestUnsoundLogits:
  @pytest.mark.parametrize("kind", SamplingKind)
  @pytest.mark.parametrize(
    "row", [[0.0, np.nan, 1.0], [0.0, np.inf, 1.0], [-np.inf] * 3]
  )
  def test_give_no_token_and_disturb_no_other_row(self, row, kind):
    temperature = 0.0 if kind is SamplingKind.GREEDY else 1.0
    logits = [[9e9, 0.0, 0.0], row, [0.0, 0.0, 9e9]]
    result = _choose(logits, SamplingParams(temperature=temperature), kind=kind)
    assert result.token.tolist() == [0, NO_TOKEN, 2]
    assert np.isnan(result.logprob).tolist() == [False, True, False]

  def test_no_token_is_ignored_by_a_dropping_scatter(self):
    marked = jnp.zeros(4, bool).at[NO_TOKEN].set(True, mode="drop")
    assert not marked.any()
