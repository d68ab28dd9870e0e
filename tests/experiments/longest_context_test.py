import json

import numpy as np
import pytest

from experiments import longest_context
from infinite_llm.errors import ConfigError
from tests.experiments.small_longest_context import small_config

pytestmark = pytest.mark.bench


@pytest.fixture(name="config")
def _config():
  return small_config()


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_what_hbm_cannot_hold_is_streamed(config, tmp_path, kv_dtype, capsys):
  config.cache.kv_dtype = kv_dtype

  result = longest_context.run(config, tmp_path)

  assert result["correct"]
  rows = result["rows"]
  assert [row["length"] for row in rows] == [32, 64, 160]
  assert [row["tokens_in_hbm"] for row in rows] == [32, 64, 32]
  # 6 rBlocks of each instance are too many, so two slabs of 4 go.
  assert [row["link_gb_per_s"] > 0 for row in rows] == [False, False, True]
  assert json.loads((tmp_path / "rows.json").read_text()) == rows
  assert (tmp_path / "curve.png").stat().st_size > 0
  output = capsys.readouterr().out
  for text in ("Weights drawn in ", "160 tokens: slab 2 of 2 in host memory"):
    assert text in output


def test_only_a_run_that_writes_results_says_anything(
  config, monkeypatch, tmp_path, capsys
):
  monkeypatch.chdir(tmp_path)

  longest_context.take_part(config)

  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().out == ""


def test_every_rblock_of_a_context_lies_somewhere(
  config, monkeypatch, tmp_path
):
  seen = []

  def time(config, decode, length):
    logical = [n for mine in decode.in_hbm for _, n in mine]
    for slab in decode.slabs.slabs:
      ids = np.asarray(slab.tables.logical_ids).reshape(2, -1)
      for mine, count in zip(ids, slab.tables.counts, strict=True):
        logical += mine[1 : 1 + int(count)].tolist()
    seen.append(sorted(logical) == list(range(length // 8)))
    return real(config, decode, length)

  real = longest_context._time
  monkeypatch.setattr(longest_context, "_time", time)
  config.lengths = (32, 80, 96, 112, 160)
  longest_context.run(config, tmp_path)
  assert seen == [True] * 5


def test_jax_looks_for_devices_once_the_platform_is_chosen(
  config, monkeypatch, tmp_path
):
  def look(*_):
    raise AssertionError("JAX has started.")

  monkeypatch.setattr(longest_context, "run_facts", look)
  monkeypatch.setattr(longest_context.jax, "process_count", look)
  config.cluster.platform = "tpu"
  with pytest.raises(ConfigError, match="platform must be one of cpu, gpu"):
    longest_context.run(config, tmp_path)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("lengths", (24,), r"lengths must be .* \(16\); got 24"),
    ("lengths", (64, 32), r"lengths must be rising; got \(64, 32\)"),
    ("lengths", (2**50,), "must fit in the host memory that is available"),
    ("cache.slab_blocks", 5, r"slab_blocks must be in .* = 5\); got 5"),
    ("cluster.platform", "gpu", "platform must be what JAX runs on, cpu; got"),
  ],
)
def test_what_cannot_work_is_refused(config, tmp_path, field, value, message):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=message):
    longest_context.run(config, tmp_path)
