"""What follows from a configuration; wrong ones are in e2e/bad_input_test."""

import pytest

from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.errors import ConfigError


def test_headroom_is_a_block_per_sequence_and_a_chunk():
  config = engine_config(
    max_num_seqs=16, prefill_buckets=(128, 1000), block_size=64
  )
  assert config.lending.headroom_blocks is None
  known = config.with_num_blocks(1024)
  assert known.lending.headroom_blocks == 16 + 16
  assert known.cache.num_blocks == 1024


def test_headroom_leaves_most_of_a_small_pool_to_lend():
  config = engine_config(block_size=64).with_num_blocks(21)
  assert config.lending.headroom_blocks == 5


@pytest.mark.parametrize("headroom", [0, 7])
def test_a_headroom_that_was_asked_for_is_kept(headroom):
  config = engine_config(headroom_blocks=headroom).with_num_blocks(9)
  assert config.lending.headroom_blocks == headroom


@pytest.mark.parametrize(
  ("most", "buckets"), [(1, (1,)), (2, (1, 2)), (16, (1, 16))]
)
def test_one_rblock_has_an_exchange_of_its_own(most, buckets):
  config = engine_config(exchange_blocks=most)
  assert config.lending.exchange_buckets == buckets


class TestHostAttention:
  def test_a_request_keeps_a_part_of_hbm_and_leaves_by_half_of_it(self):
    cache = engine_config(
      num_blocks=101,
      host_blocks=100,
      host_attention=True,
      host_attention_share=0.3,
    ).cache
    assert (cache.kept_blocks, cache.slab_blocks) == (30, 15)
    assert cache.overflow_blocks == 30 + 90  # 9 rBlocks make no slab.

  @pytest.mark.parametrize(
    ("num_blocks", "host_blocks", "slab_blocks"),
    [(2, 100, 1), (1001, 1000, 64), (1001, 11, 10)],
  )
  def test_a_slab_is_not_too_small_and_not_too_large(
    self, num_blocks, host_blocks, slab_blocks
  ):
    cache = engine_config(
      num_blocks=num_blocks, host_blocks=host_blocks, host_attention=True
    ).cache
    assert cache.slab_blocks == slab_blocks

  def test_of_float8_a_slab_has_as_many_bytes(self):
    sizes = {"num_blocks": 1001, "host_blocks": 1000, "host_attention": True}
    cache = engine_config(kv_dtype="float8_e4m3fn", **sizes).cache
    assert cache.slab_blocks == 128

  def test_without_it_no_request_has_any(self):
    cache = engine_config(num_blocks=9, host_blocks=9).cache
    assert cache.overflow_blocks == 0


class TestProgramKinds:
  def test_one_instance_has_its_steps_and_their_sampling(self):
    # 3 decode, 2 prefill; three kinds of sampling 1, 4 and 16 rows; one to
    # mark, one to write entries.
    assert EngineConfig().num_program_kinds == 5 + 9 + 2

  def test_a_group_adds_its_own(self):
    # Decode, two prefill, two exchanges, check and epochs.
    for num_instances in (2, 4):
      config = engine_config(num_instances=num_instances, spill_slots=3)
      assert config.num_program_kinds == 5 + 9 + 2 + 7
    config = engine_config(num_instances=2, exchange_blocks=1)
    assert config.num_program_kinds == 5 + 9 + 2 + 6

  def test_host_memory_adds_a_program_for_each_direction(self):
    config = engine_config(host_blocks=8)
    assert config.num_program_kinds == 5 + 9 + 2 + 2

  def test_attention_over_host_memory_adds_five_for_one_token_and_for_many(
    self,
  ):
    # And a way to HOST; its rows are one each, as in a decode bucket.
    config = engine_config(host_blocks=8, host_attention=True)
    assert config.num_program_kinds == 5 + 9 + 2 + 2 + 11
    config = engine_config(
      host_blocks=8, host_attention=True, verify_moves=True
    )  # What comes back is summed.
    assert config.num_program_kinds == 5 + 9 + 2 + 2 + 11 + 1
    config = engine_config(
      host_blocks=8, host_attention=True, decode_buckets=(4, 16)
    )
    assert config.num_program_kinds == 4 + 6 + 2 + 2 + 11 + 3

  def test_instances_that_lend_nothing_are_no_group(self):
    config = engine_config(num_instances=2, policy="static")
    assert not config.has_group
    assert config.num_program_kinds == EngineConfig().num_program_kinds


@pytest.mark.parametrize(
  ("name", "value", "text"),
  [
    ("max_lent_blocks", 10, r"must be at most the pool's 9 rBlocks; got 10\."),
    ("headroom_blocks", 9, r"must be less than the pool's 9 rBlocks, .* got 9"),
  ],
)
def test_what_no_pool_can_keep_is_refused_as_soon_as_it_is_known(
  name, value, text
):
  with pytest.raises(ConfigError, match=f"{name} {text}"):
    engine_config(num_instances=2, num_blocks=10, **{name: value})
  unknown = engine_config(num_instances=2, **{name: value})
  with pytest.raises(ConfigError, match=f"{name} {text}"):
    unknown.with_num_blocks(10)
  # Nobody lends there.
  engine_config(num_instances=1, num_blocks=10, **{name: value})
