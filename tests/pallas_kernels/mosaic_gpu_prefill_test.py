"""The prefill kernel: interpreted, and compiled where there is a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.micro_attention import reference
from pallas_kernels.micro_attention.cases import CASES, Case
from pallas_kernels.micro_attention.mosaic_gpu_prefill import prefill
from pallas_kernels.micro_attention.prefill_geometry import (
  Tuning,
  default_tuning,
)
from pallas_kernels.pool_layout import as_held
from tests.pallas_kernels.unpaged import assert_as_exact_as_unpaged
from tests.tolerances import lse_error, relative_error, tolerance

_BY_NAME = {case.name: case for case in CASES}
_SMALL = Case(
  name="small",
  query_lens=(70, 0, 1, 3),
  kv_lens=(100, 40, 30, 3),
  num_q_heads=2,
  num_kv_heads=1,
  head_dim=64,
  block_size=32,
  dtype="bfloat16",
)
# Few workers, so that each has several items; weights in shared memory.
_INTERPRETED = Tuning(
  kv_tile=64, stages=2, num_workers=2, is_interpretable=True
)


def _assert_right(case: Case, state, inputs):
  with jax.enable_x64(True):
    inputs = jax.tree.map(np.asarray, inputs)
    q = jnp.asarray(inputs.q, jnp.float64)
    expected = reference.micro_attention(*inputs._replace(q=q), **case.options)
  limits = tolerance(case.dtype, case.kv_dtype)
  assert lse_error(state.lse, expected.lse) <= limits.lse
  assert relative_error(state.out, expected.out) <= limits.attention
  assert not np.asarray(state.out)[np.isneginf(expected.lse)].any()


@pytest.mark.parametrize(
  ("changes", "kv_tile", "num_splits"),
  [
    ({"padding_queries": 5, "null_entries": 1, "padding_stride": 4}, 64, 1),
    ({"sliding_window": 19, "is_permuted": True, "num_kv_heads": 2}, 64, 2),
    ({"kv_lens": (300, 40, 30, 3)}, 192, 1),
    pytest.param({"num_q_heads": 71}, 64, 1, marks=pytest.mark.slow),
    pytest.param({"query_std": 1e6}, 64, 1, marks=pytest.mark.slow),
    ({"query_std": 1e-6}, 64, 1),
    ({"query_shift": -200}, 64, 1),
    ({"first_block": 32_768}, 64, 1),
  ],
  ids=[
    "padded",
    "window_permuted_mha_split",
    "wide_tiles",
    "group_71",
    "huge_logits",
    "tiny_logits",
    "nothing_seen",
    "far",
  ],
)
def test_interpreted_kernel_agrees_with_float64(changes, kv_tile, num_splits):
  case = dataclasses.replace(_SMALL, **changes)
  inputs = case.make_inputs()
  state = prefill(
    *inputs,
    **case.options,
    tuning=dataclasses.replace(_INTERPRETED, kv_tile=kv_tile),
    num_splits=num_splits,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  _assert_right(case, state, inputs)


def test_is_as_exact_as_attention_of_unpaged_bfloat16():
  case = dataclasses.replace(_SMALL, query_lens=(128,), kv_lens=(128,))
  inputs = case.make_inputs()
  state = prefill(
    *inputs,
    **case.options,
    tuning=_INTERPRETED,
    num_splits=1,
    interpret=plgpu.InterpretGPUParams(),
  )
  assert_as_exact_as_unpaged(case, state, inputs)


_ON_GPU = {"dtype": "bfloat16", "head_dim": 128, "num_q_heads": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("prefill_ragged", {}),
    ("prefill_ragged", {"dtype": "float16", "head_dim": 64}),
    ("prefill_many_tiles", {"block_size": 64, "head_dim": 64}),
    ("prefill_many_tiles", {"block_size": 64}),
    ("prefill_many_tiles", {"block_size": 128, "head_dim": 256}),
    ("prefill_permuted", {"num_q_heads": 6}),
    ("prefill_padded", {"block_size": 32}),
    ("prefill_window", {"num_q_heads": 2}),
    ("prefill_long_window", {"block_size": 64}),
    ("prefill_soft_cap", {"head_dim": 256}),
    ("prefill_parts_elsewhere", {}),
    ("prefill_hosted", {}),
    ("prefill_nothing_seen", {}),
    ("prefill_far", {}),
    ("prefill_huge_logits", {}),
    ("prefill_tiny_logits", {}),
    ("decode_ragged", {}),
    ("prefill_ragged", {"num_q_heads": 142, "head_dim": 64}),
    ("prefill_ragged", {"num_q_heads": 128, "num_kv_heads": 1}),
  ],
)
def test_compiled_kernel_agrees_with_float64(name, changes, num_splits):
  case = dataclasses.replace(_BY_NAME[name], **{**_ON_GPU, **changes})
  inputs = case.make_inputs()
  # Outputs get memory that was NaN before.
  jax.block_until_ready(jnp.full(inputs.q.shape, jnp.nan, jnp.float32))
  state = prefill(*inputs, **case.options, num_splits=num_splits)
  _assert_right(case, state, inputs)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dtype": "float32"}, "kv_pool: covers a dtype of bfloat16, float16"),
    ({"head_dim": 32}, "q: covers a head dim of 64, 128, 256; got 32"),
    ({"block_size": 24}, "kv_pool: covers a block size of 16, 32, 64, 128;"),
  ],
)
def test_what_is_not_covered_names_the_argument(changes, message):
  case = dataclasses.replace(_SMALL, **changes)
  with pytest.raises(NotImplementedError, match=message):
    prefill(*case.make_inputs(), **case.options)


def test_a_pool_of_another_dtype_is_not_covered():
  inputs = _SMALL.make_inputs()
  inputs = inputs._replace(q=inputs.q.astype(jnp.float16))
  with pytest.raises(NotImplementedError, match="q: covers a dtype of bfloat"):
    prefill(*inputs, **_SMALL.options)


def test_a_scale_that_turns_the_order_around_is_not_covered():
  options = _SMALL.options | {"scale": -1.0}
  with pytest.raises(NotImplementedError, match="scale: covers positive ones"):
    prefill(*_SMALL.make_inputs(), **options)


@pytest.mark.parametrize(
  ("changes", "widened_tokens"),
  [
    ({}, 64),  # Parts of two rBlocks, which end within rows.
    ({"null_entries": 1, "padding_stride": 4, "is_permuted": True}, 10**6),
    ({"query_lens": (40,), "kv_lens": (100,)}, 10**6),  # Without a loop.
    ({"query_lens": (40,), "kv_lens": (100,)}, 64),
  ],
  ids=["parts", "whole", "whole_row", "parts_of_a_row"],
)
def test_a_pool_of_8_bits_is_widened_part_by_part(changes, widened_tokens):
  case = dataclasses.replace(
    _SMALL, kv_dtype="float8_e4m3fn", num_kv_heads=2, **changes
  )
  inputs = case.make_inputs()
  state = prefill(
    *inputs._replace(kv_pool=as_held(inputs.kv_pool, jnp.uint8)),
    **case.options,
    tuning=_INTERPRETED,
    num_splits=1,
    widened_tokens=widened_tokens,
    interpret=plgpu.InterpretGPUParams(),
  )
  _assert_right(case, state, inputs)


def test_scales_of_a_pool_of_16_bits_are_not_covered():
  scale = jnp.ones(_SMALL.num_kv_heads, jnp.float32)
  with pytest.raises(NotImplementedError, match="k_scale: None; got an array"):
    prefill(
      *_SMALL.make_inputs(), **_SMALL.options, k_scale=scale, v_scale=scale
    )


@pytest.mark.parametrize(
  ("head_dim", "block_size", "kv_tile"),
  [(64, 64, 192), (64, 128, 128), (128, 16, 128), (256, 128, 64)],
)
def test_tiles_are_whole_rblocks_or_parts_of_one(head_dim, block_size, kv_tile):
  assert default_tuning(head_dim, block_size).kv_tile == kv_tile


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kv_tile": 96}, "kv_tile must be a multiple of 64 up to 256; got 96"),
    ({"stages": 1}, "stages must be at least 2; got 1"),
    ({"num_workers": 0}, "num_workers must be positive; got 0"),
  ],
)
def test_a_wrong_tuning_names_argument_rule_and_value(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_INTERPRETED, **changes)
