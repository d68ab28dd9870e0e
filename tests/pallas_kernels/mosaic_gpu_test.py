"""Which GPU kernel a call of micro-attention takes."""

import dataclasses

import jax
import pytest

from pallas_kernels.micro_attention import mosaic_gpu
from pallas_kernels.micro_attention.cases import Case
from pallas_kernels.micro_attention.mosaic_gpu import Work, suits_decode

_WORK = Work(
  query_tokens=1,
  rows=16,
  context=16384,
  num_q_heads=32,
  num_kv_heads=8,
  head_dim=128,
  is_narrow=False,
)
_CASE = Case(
  name="small",
  query_lens=(1, 1),
  kv_lens=(100, 40),
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=64,
  block_size=32,
  dtype="bfloat16",
)


def _kernels(case: Case) -> set[str]:
  """Names of the kernels in the program of a call."""
  program = str(
    jax.make_jaxpr(lambda *x: mosaic_gpu.micro_attention(*x, **case.options))(
      *case.make_inputs()
    )
  )
  names = ("micro_attention_decode", "micro_attention_prefill")
  return {name for name in names if name in program}


@pytest.mark.parametrize(
  ("changes", "is_decode"),
  [
    ({}, True),
    ({"query_tokens": 4}, True),
    ({"query_tokens": 8}, False),
    ({"query_tokens": 4, "rows": 1}, False),
    ({"query_tokens": 8, "rows": 1, "context": 1024}, True),
    ({"query_tokens": 64, "context": 1024}, False),
    ({"query_tokens": 8, "is_narrow": True}, True),
    ({"query_tokens": 64, "is_narrow": True}, False),
  ],
)
def test_the_measured_border_decides_where_there_is_one(changes, is_decode):
  assert suits_decode(_WORK._replace(**changes)) == is_decode


# Time of KV once: 2 * 2 * 16 * 16384 * K * D bytes at 4.2 TB/s; of a tile for
# each row: 16 * 16384 * (H / 2) * 128 * 4 * D operations at 600 TFLOP/s.
@pytest.mark.parametrize(
  ("changes", "is_decode"),
  [
    # 16 heads a KV head: two tokens a pass, so 8 are four passes of 64 us,
    # against 458 us.
    ({"query_tokens": 8, "num_kv_heads": 2}, True),
    # No group: 5 tokens are two passes of 1022 us, against 916 us.
    ({"query_tokens": 5, "num_kv_heads": 32}, False),
    ({"query_tokens": 4, "num_kv_heads": 32}, True),
    # D of 256 halves the tokens of a pass: two of 511 us against 916 us.
    ({"query_tokens": 4, "head_dim": 256}, False),
    ({"query_tokens": 2, "head_dim": 256}, True),
    # 40 heads are three parts, one token a pass: 24 passes of 64 us, against
    # 1145 us.
    (
      {
        "query_tokens": 8,
        "num_q_heads": 40,
        "num_kv_heads": 1,
        "head_dim": 256,
      },
      False,
    ),
    (
      {
        "query_tokens": 5,
        "num_q_heads": 40,
        "num_kv_heads": 1,
        "head_dim": 256,
      },
      True,
    ),
    # Far from what was measured: two passes of 1022 us against 1832 us.
    ({"query_tokens": 8, "rows": 128, "context": 8192}, False),
    ({"query_tokens": 4, "rows": 128, "context": 8192}, True),
  ],
)
def test_the_roofline_decides_where_nothing_was_measured(changes, is_decode):
  assert suits_decode(_WORK._replace(**changes)) == is_decode


def test_one_query_token_a_row_takes_the_decode_kernel():
  assert _kernels(_CASE) == {"micro_attention_decode"}


@pytest.mark.parametrize("group", [31, 40, 71, 128])
def test_a_group_of_any_size_takes_the_decode_kernel(group):
  case = dataclasses.replace(_CASE, num_q_heads=2 * group)
  assert _kernels(case) == {"micro_attention_decode"}


def test_many_query_tokens_a_row_take_the_prefill_kernel():
  case = dataclasses.replace(_CASE, query_lens=(40, 3))
  assert _kernels(case) == {"micro_attention_prefill"}


def test_what_the_faster_kernel_does_not_cover_takes_the_other():
  # 16 heads to a KV head suit the decode kernel, but 9 tokens are too many.
  heads = {"num_q_heads": 16, "num_kv_heads": 1}
  work = _WORK._replace(query_tokens=9, head_dim=64, **heads)
  assert suits_decode(work._replace(rows=2, context=32))
  case = dataclasses.replace(
    _CASE, query_lens=(9, 9), kv_lens=(32, 32), **heads
  )
  assert _kernels(case) == {"micro_attention_prefill"}


def test_what_neither_kernel_covers_names_both_reasons():
  case = dataclasses.replace(_CASE, dtype="float32")
  with pytest.raises(NotImplementedError, match=r"decode: q: .*prefill: kv_"):
    _kernels(case)
