import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exchange_bench
from infinite_llm.cache import movement
from tests.experiments.small_exchange_bench import small_config

pytestmark = pytest.mark.bench


def test_all_rblocks_arrive_and_rounds_are_compared(tmp_path):
  result = exchange_bench.run(small_config(), tmp_path)

  assert result["correct"]
  *moved, beside = result["rows"]
  sent = [(row["blocks"], row["senders"]) for row in moved]
  assert sent == [(1, 1), (1, 2), (3, 1), (3, 2)]
  assert all(row["correct"] for row in result["rows"])
  assert len(beside["shares"]) == 2
  assert min(beside["shares"]) <= beside["share"] <= max(beside["shares"])
  assert beside["num_processes"] == 1
  assert json.loads((tmp_path / "rows.json").read_text()) == result["rows"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rblocks_are_filled_with_different_bits_that_are_compared(dtype):
  kv = jnp.zeros((3, 2, 2, 2, 8, 4), dtype)
  for block in (1, 2):
    kv = exchange_bench._fill(kv, block, (5, 0, block))
  assert not np.asarray(kv[0]).any()
  numbers = np.asarray(kv[1:], np.float32)
  assert np.isfinite(numbers).all()
  assert len(np.unique(numbers)) > 0.9 * numbers.size
  for block, number in itertools.product(range(3), (1, 2)):
    holds = exchange_bench._holds(kv, block, (5, 0, number))
    assert holds == (block == number)
  assert not exchange_bench._holds(kv, 1, (5, 1, 1))
  assert not exchange_bench._holds(kv, 1, (6, 0, 1))
  bits = kv[1].view(f"uint{8 * kv.dtype.itemsize}")
  for axis in range(5):
    turned = kv.at[1].set(jnp.flip(kv[1], axis))
    assert not exchange_bench._holds(turned, 1, (5, 0, 1))
  other = bits.at[1, 0, 1, 3, 2].set(bits[1, 0, 1, 3, 2] ^ 1)
  changed = kv.at[1].set(other.view(kv.dtype))
  assert not exchange_bench._holds(changed, 1, (5, 0, 1))


@pytest.mark.parametrize("axis", range(2, 6))
def test_an_rblock_that_arrives_turned_round_is_noticed(
  tmp_path, monkeypatch, axis
):
  pack = movement.pack_blocks
  monkeypatch.setattr(
    movement, "pack_blocks", lambda kv, ids: jnp.flip(pack(kv, ids), axis)
  )
  result = exchange_bench.run(small_config(), tmp_path)
  assert [row["correct"] for row in result["rows"]] == [False] * 5


def test_an_rblock_that_does_not_arrive_is_noticed(tmp_path, monkeypatch):
  """Its place was never granted."""
  monkeypatch.setattr(exchange_bench, "_EPOCH", 0)
  assert not exchange_bench.run(small_config(), tmp_path)["correct"]
