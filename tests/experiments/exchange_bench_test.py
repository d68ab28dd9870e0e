import json

import pytest

from experiments import exchange_bench
from tests.experiments.small_exchange_bench import small_config

pytestmark = pytest.mark.bench


def test_all_rblocks_arrive_and_rounds_are_compared(tmp_path):
  result = exchange_bench.run(small_config(), tmp_path)

  assert result["correct"]
  *moved, beside = result["rows"]
  sent = [(row["blocks"], row["senders"]) for row in moved]
  assert sent == [(1, 1), (1, 2), (3, 1), (3, 2)]
  assert all(row["correct"] for row in moved)
  assert len(beside["shares"]) == 2
  assert min(beside["shares"]) <= beside["share"] <= max(beside["shares"])
  assert beside["num_processes"] == 1
  assert json.loads((tmp_path / "rows.json").read_text()) == result["rows"]


def test_an_rblock_that_does_not_arrive_is_noticed(tmp_path, monkeypatch):
  """Its place was never granted."""
  monkeypatch.setattr(exchange_bench, "_EPOCH", 0)
  assert not exchange_bench.run(small_config(), tmp_path)["correct"]
