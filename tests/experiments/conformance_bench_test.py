"""The conformance bench, with portable kernels in place of a GPU's."""

import ml_collections
import pytest

from experiments import conformance_bench
from infinite_llm.errors import ConfigError

pytestmark = pytest.mark.bench


def _rows(monkeypatch, *kernels, part=(0, 1)):
  monkeypatch.setattr(conformance_bench, "_KERNELS", kernels)
  monkeypatch.setattr(conformance_bench, "busy_us", lambda *_, **__: 2.0)
  cases = [
    case
    for case in conformance_bench.CASES
    if case.name in ("decode_ragged", "decode_fp8", "prefill_nothing_seen")
  ]
  assert len(cases) == 3
  monkeypatch.setattr(conformance_bench, "CASES", cases)
  config = ml_collections.ConfigDict({"seed": 0, "conformance": {"part": part}})
  return list(conformance_bench.bench(config))


def test_parts_are_all_cases_together(monkeypatch):
  whole = _rows(monkeypatch, "reference")
  parts = [
    row["case"]
    for part in range(2)
    for row in _rows(monkeypatch, "reference", part=(part, 2))
  ]
  assert sorted(parts) == sorted(row["case"] for row in whole)
  with pytest.raises(ConfigError, match=r"conformance\.part"):
    _rows(monkeypatch, "reference", part=(2, 2))


def test_each_kernel_is_the_others_peer(monkeypatch):
  rows = _rows(monkeypatch, "xla", "reference")
  assert [row["correct"] for row in rows] == [True] * 6
  assert {(row["implementation"], row["peer"]) for row in rows} == {
    ("xla", "reference"),
    ("reference", "xla"),
  }
  assert all(row["ratio"] == 1 for row in rows)
  assert all(row["tb_per_s"] > 0 for row in rows)


def test_a_kernel_that_covers_nothing_has_no_rows(monkeypatch):
  # There is no GPU in this process.
  rows = _rows(monkeypatch, "xla", "mosaic_gpu_decode")
  assert [row["implementation"] for row in rows] == ["xla"] * 3
  assert all(row["peer"] is None for row in rows)


def test_a_wrong_state_shows(monkeypatch):
  right = conformance_bench.micro_attention

  def wrong(*args, **options):
    state = right(*args, **options)
    return state._replace(out=state.out * 1.01)

  monkeypatch.setattr(conformance_bench, "micro_attention", wrong)
  rows = _rows(monkeypatch, "xla", "reference")
  # One percent of nothing is nothing.
  assert {row["case"] for row in rows if row["correct"]} == {
    "prefill_nothing_seen"
  }
