"""The bench in small: every part runs on CPU devices, and is right."""

import collections
import json

import pytest

from configs.data_plane_bench import get_config
from experiments import data_plane_bench
from infinite_llm.errors import ConfigError

pytestmark = pytest.mark.bench


@pytest.fixture(name="config")
def _config():
  config = get_config()
  config.platform = "cpu"
  config.repeats = 1
  config.model.vocab_size = 64
  config.model.model_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 1
  config.model.num_q_heads = 8
  config.model.num_kv_heads = 4
  config.model.head_dim = 16
  config.model.dtype = "float32"
  config.model.block_size = 8
  config.step.rows = 2
  config.step.context = 32
  config.step.steps, config.step.rounds = 3, 2
  config.tiers.blocks = (1, 20)
  config.links.arrays, config.links.bytes = 3, 4096
  config.host_reads.bytes = 2 * 3 * 4 * 4096
  config.host_reads.programs = 2
  config.host_attention.kv_dtypes = ("float32",)
  config.host_attention.num_blocks = 9
  config.host_attention.host_blocks = 33
  config.host_attention.prompt_tokens = 150
  config.host_attention.chunk_tokens = 16
  config.host_attention.max_tokens = 4
  config.exchange.blocks = (3,)
  config.collectives.bytes = (256, 1024)
  config.collectives.calls = (2, 3)
  config.attention.num_instances = (1, 4)
  config.attention.contexts = (64, 256)
  config.attention.layers = 2
  config.attention.calls = (1, 3)
  return config


def test_every_part_runs_and_is_right(config, tmp_path):
  result = data_plane_bench.run(config, tmp_path)

  assert result["correct"]
  assert result["left_out"] == []
  rows = result["rows"]
  assert collections.Counter(row["part"] for row in rows) == {
    "tier moves there and back": 1,
    "tier moves": 2 * (2 * 2 + 1),
    "decode beside tier moves": 2,
    "links": 2 * 3,
    "host memory": 2,
    "host attention": 1,
    "exchange": 2,
    "decode beside one rBlock a step": 1,
    "collectives": 2 * 2 * 2,
    "attention": 2 * 4,
  }
  for row in rows:
    assert row["device"]
    assert row["versions"]["jax"]
    assert row["command"].startswith("python -m experiments.run")
  errors = [row["error"] for row in rows if row["part"] == "attention"]
  assert all(error < 1e-4 for error in errors)
  exchanges = [row["context"] for row in rows if "exchange_us" in row]
  assert exchanges == [256]  # Of a quarter of which the time is known.
  ways = {row["way"] for row in rows if row["part"] == "attention"}
  assert ways == {"one device", "dist", "ring", "head-wise"}
  assert json.loads((tmp_path / "rows.json").read_text()) == rows
  assert (tmp_path / "tiers.png").stat().st_size > 0
  assert (tmp_path / "attention.png").stat().st_size > 0


def test_what_one_device_cannot_do_is_named(config, tmp_path):
  config.num_devices = 1
  config.tiers.run = config.links.run = config.host_reads.run = False
  config.host_attention.run = False
  config.attention.num_instances = (2,)

  result = data_plane_bench.run(config, tmp_path)

  assert result["rows"] == []
  assert result["left_out"] == [
    "exchange: needs 2 devices of 1",
    "collectives: needs 2 devices of 1",
    "attention over 2 instances: 1 devices",
  ]


def test_kv_that_does_not_fit_is_named(config, tmp_path):
  config.tiers.run = config.links.run = config.host_reads.run = False
  config.host_attention.run = False
  config.exchange.run = config.collectives.run = False
  config.attention.num_instances = (1,)
  config.attention.contexts = (64,)
  config.attention.most_bytes = 1e3

  (row,) = data_plane_bench.run(config, tmp_path)["rows"]

  assert row["left_out"] == "its KV takes more than most_bytes"


def test_only_the_ways_that_are_named_are_timed(config, tmp_path):
  config.tiers.run = config.links.run = config.host_reads.run = False
  config.host_attention.run = False
  config.exchange.run = config.collectives.run = False
  config.attention.ways = ("one device", "dist")

  rows = data_plane_bench.run(config, tmp_path)["rows"]

  assert [row["way"] for row in rows] == 2 * ["one device", "dist"]


def test_a_way_that_there_is_not_is_refused(config, tmp_path):
  config.attention.ways = ("dist", "rings")
  message = r"attention\.ways must be of \['dist', .*\]; got 'rings'"
  with pytest.raises(ConfigError, match=message):
    data_plane_bench.run(config, tmp_path)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("platform", "gpu", "platform must be what JAX runs on, cpu; got 'gpu'"),
    ("num_devices", 5, r"num_devices must be in \[0, 4\]; got 5"),
  ],
)
def test_devices_that_are_not_there_are_refused(
  config, tmp_path, field, value, message
):
  config[field] = value
  with pytest.raises(ConfigError, match=message):
    data_plane_bench.run(config, tmp_path)
