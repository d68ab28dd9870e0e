"""The decode kernel, interpreted on a CPU; on a GPU, if there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention import reference
from pallas_kernels.micro_attention.cases import CASES, Case
from pallas_kernels.micro_attention.decode_geometry import (
  MULTIPROCESSORS,
  Tuning,
  default_tuning,
)
from pallas_kernels.micro_attention.mosaic_gpu_decode import decode
from pallas_kernels.pool_layout import as_held
from tests.pallas_kernels.unpaged import assert_as_exact_as_unpaged
from tests.tolerances import lse_error, relative_error, tolerance

_ONE = {"query_lens": (1, 1, 0, 1), "kv_lens": (200, 1, 0, 64)}
_SEVERAL = {"query_lens": (3, 8, 0, 1), "kv_lens": (150, 9, 0, 64)}
_bf16 = functools.partial(Case, dtype="bfloat16", head_dim=64)
_fp8 = functools.partial(_bf16, kv_dtype="float8_e4m3fn")

_OWN = (
  _bf16(name="ragged", **_ONE, is_permuted=True, null_entries=2),
  _bf16(name="window", **_ONE, sliding_window=20, padding_queries=3),
  _bf16(name="soft_cap", **_ONE, logit_soft_cap=2.0, query_std=5.0),
  _bf16(name="nothing_seen", **_ONE, query_shift=-300),
  _bf16(name="nothing_held", query_lens=(1, 1), kv_lens=(0, 0)),
  _bf16(name="some_held", query_lens=(1, 2, 1, 1), kv_lens=(0, 90, 0, 30)),
  _bf16(name="several_tokens", **_SEVERAL, padding_stride=3),
  Case(
    name="odd_group",
    **_SEVERAL,
    dtype="float16",
    head_dim=128,
    num_q_heads=14,
    num_kv_heads=2,
    block_size=128,
  ),
  _bf16(name="group_32", **_ONE, num_q_heads=32, num_kv_heads=1),
  Case(
    name="parts_of_48_heads",
    **_SEVERAL,
    dtype="float16",
    head_dim=128,
    num_q_heads=96,
    num_kv_heads=2,
    logit_soft_cap=2.0,
  ),
  _fp8(name="fp8_group_3", **_ONE, head_dim=256, num_q_heads=6),
  _fp8(name="fp8", **_ONE, is_permuted=True, null_entries=2),
  _fp8(name="fp8_huge_logits", **_ONE, query_std=1e6),
  _fp8(name="fp8_tiny_logits", **_ONE, query_std=1e-6),
  _fp8(name="fp8_several_tokens", **_SEVERAL, padding_stride=3, head_dim=128),
  _fp8(
    name="fp8_f16_options",
    **_ONE,
    dtype="float16",
    sliding_window=20,
    logit_soft_cap=2.0,
    block_size=32,
  ),
)


_SHARED = tuple(
  case.on_tensor_cores() for case in CASES if max(case.query_lens) <= 8
)
_CASES = (*_OWN, *_SHARED)
_BY_NAME = {case.name: case for case in _CASES}
# Interpreted, each costs seconds; these say what the kernel's own do not.
_SLOW = (
  "parts_of_48_heads",
  "fp8_group_3",
  "odd_group",
  "group_32",
  "decode_group_40_fp8",
)
_INTERPRETED = (
  *_OWN,
  *(
    _BY_NAME[f"decode_{name}"]
    for name in (
      "group_71_bf16",
      "group_40_fp8",
      "odd_heads_bf16",
      "parts_elsewhere",
      "far",
      "huge_logits",
      "tiny_logits",
    )
  ),
)


def _assert_close(case, state, inputs):
  exact = inputs._replace(
    q=inputs.q.astype(jnp.float32), kv_pool=inputs.kv_pool.astype(jnp.float32)
  )
  with jax.default_matmul_precision("highest"):
    expected = reference.micro_attention(*exact, **case.options)
  limits = tolerance(case.dtype)
  assert relative_error(state.out, expected.out) <= limits.attention
  assert lse_error(state.lse, expected.lse) <= limits.lse


def test_case_names_are_unique():
  assert len(_BY_NAME) == len(_CASES)


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.slow] if case.name in _SLOW else [])
    for case in _INTERPRETED
  ],
  ids=str,
)
def test_interpreted_workers_merge_to_the_whole(case):
  inputs = case.make_inputs()
  state = decode(
    *inputs,
    **case.options,
    tuning=Tuning(tile_tokens=64, num_stages=2, num_workers=3),
    interpret=plgpu.InterpretGPUParams(),
  )
  _assert_close(case, state, inputs)


def test_is_as_exact_as_attention_of_unpaged_bfloat16():
  case = _bf16(name="one_row", query_lens=(1,), kv_lens=(512,))
  inputs = case.make_inputs()
  state = decode(
    *inputs,
    **case.options,
    tuning=Tuning(tile_tokens=64, num_stages=2, num_workers=3),
    interpret=plgpu.InterpretGPUParams(),
  )
  assert_as_exact_as_unpaged(case, state, inputs)


def test_a_pool_of_bytes_is_one_of_8_bit_numbers():
  case = _BY_NAME["fp8"]
  inputs = case.make_inputs()
  bits = as_held(inputs.kv_pool, jnp.uint8)
  state = decode(
    *inputs._replace(kv_pool=bits),
    **case.options,
    tuning=Tuning(tile_tokens=64, num_stages=2, num_workers=3),
    interpret=plgpu.InterpretGPUParams(),
  )
  _assert_close(case, state, inputs)


@pytest.mark.parametrize(
  "name",
  [
    "ragged",
    "fp8",
    pytest.param("decode_group_71_bf16", marks=pytest.mark.slow),
    pytest.param("decode_group_40_fp8", marks=pytest.mark.slow),
  ],
)
def test_a_worker_has_no_races(name):
  # Of several, the merge has: the interpreter knows no semaphores, and runs
  # one worker after another.
  case = _BY_NAME[name]
  inputs = case.make_inputs()
  state = decode(
    *inputs,
    **case.options,
    tuning=Tuning(tile_tokens=64, num_stages=4, num_wide_v=2, num_workers=1),
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  _assert_close(case, state, inputs)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"num_stages": 3}, r"tuning\.num_stages must be even .*; got 3"),
    (
      {"num_stages": 4, "num_wide_v": 1},
      r"tuning\.num_wide_v must be even .*; got 1",
    ),
  ],
)
def test_two_warpgroups_in_turns_need_rings_of_even_size(sizes, message):
  case = _BY_NAME["fp8"]
  with pytest.raises(ValueError, match=message):
    decode(*case.make_inputs(), **case.options, tuning=Tuning(**sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_a_gpu_agrees(case):
  inputs = case.make_inputs()
  # Outputs get memory that was NaN before.
  jax.block_until_ready(jnp.full(inputs.q.shape, jnp.nan, jnp.float32))
  _assert_close(case, decode(*inputs, **case.options), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_spared", [4, MULTIPROCESSORS - 1])
@pytest.mark.parametrize("name", ["ragged", "fp8", "several_tokens"])
def test_a_gpu_agrees_with_some_multiprocessors_spared(name, num_spared):
  case = _BY_NAME[name]
  inputs = case.make_inputs()
  state = decode(*inputs, **case.options, spared_multiprocessors=num_spared)
  _assert_close(case, state, inputs)


@pytest.mark.parametrize("is_narrow", [False, True])
def test_those_spared_get_no_worker(is_narrow):
  tuning = default_tuning(128, 8, is_narrow=is_narrow)
  assert tuning.num_workers == MULTIPROCESSORS
  spared = default_tuning(128, 8, is_narrow=is_narrow, num_spared=5)
  assert spared == dataclasses.replace(tuning, num_workers=MULTIPROCESSORS - 5)


def test_not_all_multiprocessors_can_be_spared():
  case = _BY_NAME["ragged"]
  message = "spared_multiprocessors: less than 132; got 132"
  with pytest.raises(NotImplementedError, match=message):
    decode(*case.make_inputs(), **case.options, spared_multiprocessors=132)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dtype": "float32"}, "q: bfloat16 or float16; got float32"),
    ({"head_dim": 32}, "kv_pool: D of 64, 128 or 256; got 32"),
    ({"block_size": 24}, "kv_pool: P of 16, 32, 64 or 128; got 24"),
    ({"query_lens": (9, 1, 0, 1)}, "max_query_tokens: at most 8; got 9"),
  ],
)
def test_what_is_not_covered_names_the_argument(changes, message):
  case = Case(
    **(
      {"dtype": "bfloat16", "head_dim": 64, "name": "refused", **_ONE} | changes
    )
  )
  with pytest.raises(NotImplementedError, match=message):
    decode(*case.make_inputs(), **case.options)
