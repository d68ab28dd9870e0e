"""The arithmetic with numbers; the measuring with a report that is faked."""

import pytest

from infinite_llm.cache.device_memory import DeviceMemory
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import pool_size
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.pool_size import Needs, blocks_that_fit
from infinite_llm.errors import ConfigError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.testing import drain, pools_are_empty, write_shallow_checkpoint

GIB = 2**30


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory):
  folder = write_shallow_checkpoint(tmp_path_factory.mktemp("pool_size"))
  return load_hf(folder, make_mesh(2, 1), dtype="float32")


def options(**changes):
  return {
    "num_instances": 2,
    "block_size": 16,
    "max_num_seqs": 4,
    "decode_buckets": (4,),
    "prefill_buckets": (32,),
    "group_prefill_buckets": (32,),
  } | changes


class TestArithmetic:
  def fit(self, *, limit=100, in_use=40, temporary=12, block=4, fraction=0.9):
    memory = DeviceMemory(limit_bytes=limit, in_use_bytes=in_use)
    needs = Needs(temporary_bytes=temporary, block_bytes=block)
    return blocks_that_fit(memory, needs, fraction=fraction)

  def test_what_is_free_is_divided(self):
    assert self.fit() == (90 - 40 - 12) // 4 == 9

  def test_part_of_a_block_is_none(self):
    assert self.fit(temporary=14) == 9
    assert self.fit(temporary=15) == 8

  def test_a_large_device_holds_what_a_calculation_says(self):
    # An 8B Llama 3 in bfloat16 on 141 GB: 8 MiB an rBlock of 64 tokens.
    blocks = self.fit(
      limit=141 * 10**9,
      in_use=16 * 10**9,
      temporary=2 * 10**9,
      block=8 * 2**20,
      fraction=0.92,
    )
    assert blocks == 13318

  @pytest.mark.parametrize(("in_use", "fits"), [(71, 1), (75, 0), (99, 0)])
  def test_nothing_that_fits_is_an_error_with_all_its_terms(self, in_use, fits):
    message = (
      rf"num_blocks must be at least 2, but {fits} fit: of 100 bytes"
      rf" memory_fraction = 0\.9 allows 90; weights take {in_use}, temporaries"
      rf" of the steps 12, which leaves {90 - in_use - 12} for rBlocks of 4\."
    )
    with pytest.raises(ConfigError, match=message):
      self.fit(in_use=in_use)


class TestMeasuring:
  def test_an_rblock_has_the_bytes_of_its_vectors(self, model):
    # One layer of two KV heads of 16 dimensions; a share of the tables.
    assert model.config.num_kv_heads * model.config.head_dim == 32
    for changes, kv_bytes in (
      ({}, 2 * 16 * 32 * 4),
      ({"kv_dtype": "bfloat16"}, 2 * 16 * 32 * 2),
      ({"kv_dtype": "float8_e4m3fn"}, 2 * 16 * 32),
      ({"block_size": 32}, 2 * 32 * 32 * 4),
    ):
      config = engine_config(**options(policy="static", **changes))
      assert pool_size.measure(model, config).block_bytes == kv_bytes + 128

  def test_larger_buckets_need_more(self, model):
    small = engine_config(**options(policy="static"))
    large = engine_config(**options(policy="static", prefill_buckets=(256,)))
    small, large = (
      pool_size.measure(model, config).temporary_bytes
      for config in (small, large)
    )
    # The logits alone of four decode rows: 4 x 256 x 4 bytes.
    assert 4096 < small < large

  def test_host_memory_needs_batches_both_ways_and_padding(self, model):
    without, with_host = (
      pool_size.measure(
        model, engine_config(**options(policy="static", host_blocks=blocks))
      )
      for blocks in (0, 100)
    )
    kv_bytes = 2 * 16 * 32 * 4
    more = with_host.temporary_bytes - without.temporary_bytes
    assert more == (2 * 3 * 16 + 1) * kv_bytes
    assert with_host.block_bytes == without.block_bytes

  def test_devices_that_report_nothing_get_a_fixed_size(self, model):
    assert pool_size.device_memory(model.mesh.devices.flat) is None
    config = pool_size.with_pool_size(model, engine_config(**options()))
    assert config.cache.num_blocks == pool_size.UNMEASURED_NUM_BLOCKS
    assert config.lending.headroom_blocks == 4 + 2

  def test_a_size_that_was_asked_for_is_kept(self, model, monkeypatch):
    monkeypatch.setattr(pool_size, "device_memory", pytest.fail)
    config = engine_config(**options(num_blocks=12, headroom_blocks=1))
    assert pool_size.with_pool_size(model, config) == config

  @pytest.mark.slow
  def test_an_engine_fills_the_smallest_device(self, model, monkeypatch):
    config = engine_config(**options(memory_fraction=0.5, headroom_blocks=0))
    needs = pool_size.measure(model, config)
    in_use = 10 * GIB
    limits = [
      2 * (in_use + needs.temporary_bytes + n * needs.block_bytes) + 2
      for n in (300, 21)
    ]
    monkeypatch.setattr(
      pool_size,
      "device_memory",
      lambda _: [
        DeviceMemory(limit_bytes=limit, in_use_bytes=in_use) for limit in limits
      ],
    )
    engine = Engine(model, config)
    assert engine.config.cache.num_blocks == 21
    assert [counts.total for counts in engine.pool_counts()] == [20, 20]
    assert engine.capacity_tokens == 2 * 20 * 16
    name = engine.add_request(
      [5] * 400, SamplingParams(max_tokens=3, ignore_eos=True), instance=0
    )
    assert len(drain(engine)[name].token_ids) == 3
    assert pools_are_empty(engine)

  def test_float8_holds_twice_the_tokens_of_bfloat16(self, model, monkeypatch):
    rblock = 2 * 512 * 32  # Numbers; its share of the tables is small.
    monkeypatch.setattr(
      pool_size,
      "device_memory",
      lambda _: [
        DeviceMemory(limit_bytes=GIB + 10**4 * 2 * rblock, in_use_bytes=GIB)
      ],
    )
    half, whole = (
      pool_size.with_pool_size(
        model,
        engine_config(
          **options(
            policy="static",
            block_size=512,
            memory_fraction=1.0,
            kv_dtype=kv_dtype,
          )
        ),
      ).cache.capacity_tokens
      for kv_dtype in ("bfloat16", "float8_e4m3fn")
    )
    assert half < 10**4 * 512
    assert 1.98 * half < whole < 2 * half

  def test_an_engine_that_does_not_fit_says_why(self, model, monkeypatch):
    full = DeviceMemory(limit_bytes=GIB, in_use_bytes=GIB)
    monkeypatch.setattr(pool_size, "device_memory", lambda _: [full] * 2)
    with pytest.raises(
      ConfigError, match="weights take 1073741824, temporaries"
    ):
      Engine(model, engine_config(**options()))
