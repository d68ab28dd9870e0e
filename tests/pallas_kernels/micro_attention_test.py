"""Every implementation of micro-attention, against float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.attention_state import (
  AttentionState,
  merge,
  merge_many,
)
from pallas_kernels.micro_attention import reference
from pallas_kernels.micro_attention.api import (
  IMPLEMENTATIONS,
  BlockTables,
  micro_attention,
)
from pallas_kernels.micro_attention.cases import CASES, Case, hold
from pallas_kernels.pool_layout import NULL_BLOCK_ID, as_held
from tests.tolerances import lse_error, relative_error, tolerance

_CASES = {case.name: case for case in CASES}
# Those that run here; the tests of the others run them in their own ways.
_PORTABLE = [n for n in IMPLEMENTATIONS.names if not n.startswith("mosaic")]


@functools.cache
def _inputs(case: Case):
  return case.make_inputs()


@functools.cache
def _expected(case: Case) -> AttentionState:
  """Float64 attention, one query after another, token by token."""
  q, cu_seqlens, q_positions, kv_pool, layer, tables = jax.tree.map(
    np.asarray, _inputs(case)
  )
  block_size, group = case.block_size, case.num_q_heads // case.num_kv_heads
  window = case.sliding_window or np.inf
  out = np.zeros(q.shape)
  lse = np.full(q.shape[:2], -np.inf)
  for row, (start, count) in enumerate(
    zip(tables.starts, tables.counts, strict=True)
  ):
    entries = [
      (block_id, logical_id)
      for block_id, logical_id in zip(
        tables.block_ids[start : start + count],
        tables.logical_ids[start : start + count],
        strict=True,
      )
      if block_id != NULL_BLOCK_ID
    ]
    if not entries:
      continue
    kv = np.concatenate([kv_pool[b, layer] for b, _ in entries], axis=2)
    kv = kv.astype(np.float64)  # [2, K, S, D]
    if "k_scale" in case.options:
      scales = [case.options["k_scale"], case.options["v_scale"]]
      kv *= np.asarray(scales, np.float64)[:, :, None, None]
    kv = np.repeat(kv, group, axis=1)  # [2, H, S, D]
    positions = np.concatenate(
      [i * block_size + np.arange(block_size) for _, i in entries]
    )
    for t in range(cu_seqlens[row], cu_seqlens[row + 1]):
      behind = q_positions[t] - positions
      seen = (behind >= 0) & (behind < window)
      if not seen.any():
        continue
      k, v = kv[:, :, seen]
      logits = np.einsum("hd,hsd->hs", q[t].astype(np.float64), k)
      logits *= case.options["scale"]
      if case.logit_soft_cap is not None:
        logits = case.logit_soft_cap * np.tanh(logits / case.logit_soft_cap)
      lse[t] = np.logaddexp.reduce(logits, axis=1)
      weights = np.exp(logits - lse[t][:, None])
      out[t] = np.einsum("hs,hsd->hd", weights, v)
  return AttentionState(out=out, lse=lse)


@functools.partial(
  jax.jit,
  static_argnames=(
    "scale",
    "max_query_tokens",
    "sliding_window",
    "logit_soft_cap",
    "implementation",
  ),
)
def _call(*inputs, **options) -> AttentionState:
  """One function, so that cases of the same shapes share a program."""
  return micro_attention(*inputs, **options)


@pytest.mark.parametrize("implementation", _PORTABLE)
@pytest.mark.parametrize("name", ["decode_fp8", "prefill_fp8"])
def test_a_pool_of_bytes_is_one_of_8_bit_numbers(name, implementation):
  case = _CASES[name]
  inputs = _inputs(case)
  bits = as_held(inputs.kv_pool, jnp.uint8)
  expected, state = (
    _call(*x, **case.options, implementation=implementation)
    for x in (inputs, inputs._replace(kv_pool=bits))
  )
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def _assert_close(case: Case, state: AttentionState):
  expected = _expected(case)
  limits = tolerance(case.dtype)
  assert state.out.dtype == state.lse.dtype == jnp.float32
  assert lse_error(state.lse, expected.lse) <= limits.lse
  assert relative_error(state.out, expected.out) <= limits.attention
  assert not np.asarray(state.out)[np.isneginf(expected.lse)].any()


def test_case_names_are_unique():
  assert len(_CASES) == len(CASES)


@pytest.mark.parametrize("name", _PORTABLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case, name):
  _assert_close(
    case, _call(*_inputs(case), implementation=name, **case.options)
  )


def test_the_reference_computes_in_float64_if_asked():
  case = _CASES["prefill_ragged"]
  inputs = jax.tree.map(np.asarray, _inputs(case))
  with jax.enable_x64(True):
    q = jnp.asarray(inputs.q, jnp.float64)
    state = reference.micro_attention(*inputs._replace(q=q), **case.options)
    assert state.out.dtype == state.lse.dtype == jnp.float64
    assert relative_error(state.out, _expected(case).out) < 1e-14
    assert lse_error(state.lse, _expected(case).lse) < 1e-14


def test_huge_logits_leave_one_token():
  # So the case tests what its name says: the softmax is a maximum.
  case = _CASES["decode_huge_logits"]
  assert np.abs(_expected(case).lse[0]).max() > 1e5


@pytest.mark.parametrize("name", _PORTABLE)
@pytest.mark.parametrize("case_name", ["decode_ragged", "prefill_ragged"])
def test_layer_may_be_an_int(case_name, name):
  case = _CASES[case_name]
  inputs = _inputs(case)
  inputs = inputs._replace(layer=int(inputs.layer))
  _assert_close(
    case, micro_attention(*inputs, implementation=name, **case.options)
  )


@pytest.mark.parametrize("name", _PORTABLE)
def test_a_larger_bound_on_query_tokens_changes_nothing(name):
  case = _CASES["decode_ragged"]
  options = case.options | {"max_query_tokens": 16}
  _assert_close(case, _call(*_inputs(case), implementation=name, **options))


@pytest.mark.parametrize("name", _PORTABLE)
@pytest.mark.parametrize("num_queries", [0, 3])
def test_tables_without_entries_give_empty_states(num_queries, name):
  none = jnp.zeros(0, jnp.int32)
  one = jnp.zeros(1, jnp.int32)
  state = micro_attention(
    jnp.ones((num_queries, 4, 16)),
    jnp.array([0, num_queries], jnp.int32),
    jnp.arange(num_queries, dtype=jnp.int32),
    jnp.ones((2, 1, 2, 2, 8, 16)),
    0,
    BlockTables(none, none, one, one),
    scale=1.0,
    max_query_tokens=4,
    implementation=name,
  )
  assert state.out.shape == (num_queries, 4, 16)
  assert not state.out.any()
  assert np.isneginf(state.lse).all()


# Any cut of a table over holders.


@pytest.mark.parametrize("name", _PORTABLE)
@pytest.mark.parametrize(
  "case_name",
  ["decode_ragged", "decode_window", "prefill_ragged", "prefill_far"],
)
@hypothesis.settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_any_split_over_holders_merges_to_the_whole(data, case_name, name):
  case, num_holders = _CASES[case_name], 3
  inputs = _inputs(case)
  num_entries = inputs.tables.block_ids.shape[0]
  holders = np.array(
    data.draw(
      st.lists(
        st.integers(0, num_holders - 1),
        min_size=num_entries,
        max_size=num_entries,
      )
    )
  )
  states = [
    _call(
      *inputs._replace(tables=hold(inputs.tables, holders == holder)),
      implementation=name,
      **case.options,
    )
    for holder in range(num_holders)
  ]
  _assert_close(case, functools.reduce(merge, states))
  _assert_close(
    case, merge_many(jax.tree.map(lambda *x: jnp.stack(x), *states))
  )


# Memory.


@pytest.mark.parametrize("max_query_tokens", [1, 64])
@pytest.mark.parametrize("block_size", [16, 64])
def test_layers_of_append_and_attention_never_copy_the_pool(
  max_query_tokens, block_size
):
  num_tokens, num_rows, num_entries, num_layers = 64, 64, 100_000, 4
  num_blocks = 16 * 100_000 // block_size
  of = jax.ShapeDtypeStruct
  pool = of((num_blocks, num_layers, 2, 2, block_size, 32), jnp.bfloat16)

  def program(kv_pool, x, first_layer, cu_seqlens, positions, tables, ids):
    for i in range(3):
      layer = first_layer + i if i else 0
      kv = x[:, :2]
      kv_pool = append_kv(kv_pool, layer, kv, kv, ids, ids)
      x += micro_attention(
        x,
        cu_seqlens,
        positions,
        kv_pool,
        layer,
        tables,
        scale=1.0,
        max_query_tokens=max_query_tokens,
        sliding_window=1000,
        implementation="xla",
      ).out
    return kv_pool, x

  def ints(*shape):
    return of(shape, jnp.int32)

  compiled = (
    jax.jit(program, donate_argnums=0)
    .lower(
      pool,
      of((num_tokens, 4, 32), jnp.float32),
      ints(),
      ints(num_rows + 1),
      ints(num_tokens),
      BlockTables(
        ints(num_entries), ints(num_entries), ints(num_rows), ints(num_rows)
      ),
      ints(num_tokens),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  pool_bytes = pool.size * pool.dtype.itemsize
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


# Wrong calls.


def _wrong_call(**changes):
  inputs = _inputs(_CASES["decode_ragged"])
  arguments = inputs._asdict() | _CASES["decode_ragged"].options
  for name, change in changes.items():
    arguments[name] = change(arguments.get(name))
  return micro_attention(**arguments)


def _tables_with(**changes):
  return lambda tables: tables._replace(
    **{name: change(getattr(tables, name)) for name, change in changes.items()}
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"q": lambda x: x[0]}, r"q must be \[T, H, D\]; got \[4, 32\]"),
    ({"q": lambda x: x[:, :3]}, r"H of q must be a multiple of K .* 2; got 3"),
    ({"q": lambda x: x[..., :8]}, r"D of q must be D of kv_pool = 32; got 8"),
    ({"q": lambda x: x.astype(int)}, "q must be floating-point; got int32"),
    (
      {"q_positions": lambda x: x[:-1]},
      r"q_positions must be \[T\] = \[4\]; got \[3\]",
    ),
    (
      {"q_positions": lambda x: x.astype(jnp.int16)},
      "q_positions must be int32; got int16",
    ),
    (
      {"cu_seqlens": lambda x: x[0]},
      r"cu_seqlens must be \[B \+ 1\]; got \[\]",
    ),
    ({"cu_seqlens": lambda x: x * 1.0}, "cu_seqlens must be int32"),
    (
      {"kv_pool": lambda x: x[:, 0]},
      r"kv_pool must be \[N, L, 2, K, P, D\]; got",
    ),
    (
      {"kv_pool": lambda x: x[..., :12, :]},
      r"block_size .* a positive multiple of 8; got 12",
    ),
    ({"kv_pool": lambda x: x[:0]}, "kv_pool must be not empty"),
    ({"kv_pool": lambda x: x.astype(int)}, "kv_pool must be floating-point"),
    ({"layer": lambda _: 2}, r"layer must be in \[0, 2\).*; got 2"),
    ({"layer": lambda _: -1}, r"layer must be in \[0, 2\).*; got -1"),
    ({"layer": lambda _: 1.0}, r"layer must be an int or a \[\] integer array"),
    (
      {"tables": _tables_with(block_ids=lambda x: x[None])},
      r"tables.block_ids must be one-dimensional",
    ),
    (
      {"tables": _tables_with(logical_ids=lambda x: x[:-1])},
      r"tables.logical_ids must be \[E\]",
    ),
    (
      {"tables": _tables_with(counts=lambda x: x[:-1])},
      r"tables.counts must be \[B\] = \[5\]; got \[4\]",
    ),
    (
      {"tables": _tables_with(starts=lambda x: x * 1.0)},
      "tables.starts must be int32; got float32",
    ),
    ({"scale": lambda _: float("nan")}, "scale must be a finite Python number"),
    (
      {"k_scale": lambda _: jnp.ones(2)},
      "v_scale must be given with the other scale; got None",
    ),
    (
      {"k_scale": lambda _: jnp.ones(3), "v_scale": lambda _: jnp.ones(2)},
      r"k_scale must be \[K\] = \[2\]; got \[3\]",
    ),
    (
      {
        "k_scale": lambda _: jnp.ones(2),
        "v_scale": lambda _: jnp.ones(2, jnp.bfloat16),
      },
      "v_scale must be float32; got bfloat16",
    ),
    ({"scale": lambda _: None}, "scale must be a finite Python number"),
    ({"max_query_tokens": lambda _: 0}, "max_query_tokens must be .* got 0"),
    ({"sliding_window": lambda _: 0}, "sliding_window must be .* got 0"),
    (
      {"spared_multiprocessors": lambda _: -1},
      "spared_multiprocessors must be .* at least 0; got -1",
    ),
    ({"sliding_window": lambda _: 2**31}, "sliding_window must be .* got 2147"),
    ({"logit_soft_cap": lambda _: 0.0}, "logit_soft_cap must be .* got 0.0"),
  ],
)
def test_a_wrong_call_names_argument_rule_and_value(changes, message):
  with pytest.raises(ValueError, match=message):
    _wrong_call(**changes)


@pytest.mark.parametrize("implementation", _PORTABLE)
def test_spared_multiprocessors_change_nothing_elsewhere(implementation):
  case = _CASES["decode_ragged"]
  expected, state = (
    micro_attention(
      *_inputs(case),
      **case.options,
      spared_multiprocessors=num_spared,
      implementation=implementation,
    )
    for num_spared in (0, 7)
  )
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_an_unknown_implementation_names_the_known_ones():
  with pytest.raises(ValueError, match=r"xla, reference, .*; got 'cuda'"):
    micro_attention(
      *_inputs(_CASES["decode_ragged"]),
      implementation="cuda",
      **_CASES["decode_ragged"].options,
    )


def test_float64_is_left_to_the_reference():
  case = _CASES["decode_ragged"]
  with jax.enable_x64(True):
    inputs = _inputs(case)
    inputs = inputs._replace(q=inputs.q.astype(jnp.float64))
    assert _call(*inputs, **case.options).out.dtype == jnp.float64
    with pytest.raises(NotImplementedError, match="q: accumulates in float32"):
      micro_attention(*inputs, implementation="xla", **case.options)
