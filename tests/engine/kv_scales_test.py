"""Scales of keys and values: whose are taken, which are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from infinite_llm.config import CacheConfig, engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import member
from infinite_llm.engine.kv_scales import place_kv_scales
from infinite_llm.errors import ConfigError
from infinite_llm.models.hf_loader import load_hf
from tests.testing import write_shallow_checkpoint

KV_DTYPE = "float8_e4m3fn"
RIGHT = np.float32([[[0.5, 2.0], [0.1, 3.0]]])  # One layer of two KV heads.


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("scales"))


@pytest.fixture(scope="module", name="model")
def _model(folder):
  return load_hf(folder, make_mesh(2, 2), dtype="float32")


def placed(model, **options) -> jax.Array | None:
  config = engine_config(num_instances=2, tensor_parallel=2, **options)
  return place_kv_scales(model, config)


def test_an_array_goes_to_all_devices_by_heads(model):
  scales = placed(model, kv_dtype=KV_DTYPE, kv_scales=RIGHT)
  assert scales.dtype == np.float32
  assert scales.sharding.spec == PartitionSpec(None, None, "tensor")
  assert len(scales.sharding.device_set) == 4
  np.testing.assert_array_equal(scales, RIGHT)


def test_a_file_is_as_good(model, tmp_path):
  np.save(tmp_path / "scales.npy", RIGHT.astype(np.float64))
  scales = placed(model, kv_dtype=KV_DTYPE, kv_scales=tmp_path / "scales.npy")
  np.testing.assert_array_equal(scales, RIGHT)


def test_the_checkpoints_own_are_taken_unless_others_are_given(model):
  model = dataclasses.replace(model, kv_scales=3 * RIGHT)
  scales = placed(model, kv_dtype=KV_DTYPE)
  np.testing.assert_array_equal(scales, 3 * RIGHT)
  scales = placed(model, kv_dtype=KV_DTYPE, kv_scales=RIGHT)
  np.testing.assert_array_equal(scales, RIGHT)


def test_without_any_they_are_one(model):
  np.testing.assert_array_equal(
    placed(model, kv_dtype=KV_DTYPE), np.ones((1, 2, 2), np.float32)
  )


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
def test_other_dtypes_have_none_whatever_the_checkpoint_has(model, kv_dtype):
  model = dataclasses.replace(model, kv_scales=RIGHT)
  assert placed(model, kv_dtype=kv_dtype) is None


def test_ranks_that_share_a_kv_head_share_its_scale(tmp_path):
  folder = write_shallow_checkpoint(tmp_path, "llama2", num_kv_heads=2)
  model = load_hf(folder, make_mesh(1, 4), dtype="float32")
  config = engine_config(tensor_parallel=4, kv_dtype=KV_DTYPE, kv_scales=RIGHT)
  np.testing.assert_array_equal(
    place_kv_scales(model, config), np.repeat(RIGHT, 2, axis=2)
  )


def test_a_configuration_with_scales_is_a_value():
  one, other = (
    CacheConfig(kv_dtype=KV_DTYPE, kv_scales=scales)
    for scales in (RIGHT, RIGHT.tolist())
  )
  assert one == other
  assert hash(one) == hash(other)
  assert one.kv_scales[0][0] == (0.5, 2.0)


def test_other_processes_get_the_same_scales():
  config = engine_config(kv_dtype=KV_DTYPE, kv_scales=RIGHT)
  text = json.dumps(dataclasses.asdict(config))
  assert member._config(text) == config


def changed(place, value):
  scales = RIGHT.copy()
  scales[place] = value
  return scales


@pytest.mark.parametrize(
  ("scales", "message"),
  [
    (changed((0, 1, 0), 0), r"kv_scales\[0, 1, 0\] must be in .*; got 0\.0\."),
    (changed((0, 0, 1), -2), r"kv_scales\[0, 0, 1\] must be in .*; got -2\.0"),
    (changed((0, 0, 0), np.nan), r"kv_scales\[0, 0, 0\] must be in.*; got nan"),
    (changed((0, 0, 0), np.inf), r"kv_scales\[0, 0, 0\] must be in.*; got inf"),
    (changed((0, 0, 0), 1e-39), r"must be in \[1.2e-38, 7.5e\+35\]; got 1\."),
    (changed((0, 0, 0), 1e36), r"kv_scales\[0, 0, 0\] must be in .*e\+35"),
    (RIGHT[0], r"kv_scales must be \[L, 2, K\]: .*; got \[2, 2\]\."),
    (RIGHT[:, :1], r"kv_scales must be \[L, 2, K\]: .*; got \[1, 1, 2\]\."),
    (RIGHT[:0], r"kv_scales must be \[L, 2, K\]: .*; got \[0, 2, 2\]\."),
    (3, r"kv_scales must be \[L, 2, K\]: .*; got \[\]\."),
    ([[1.0], [1.0, 2.0]], r"kv_scales must be a path or an array \[L, 2, K\]"),
    (np.full((1, 2, 2), "a"), r"kv_scales must be an array of numbers; got"),
  ],
)
def test_what_can_be_no_scales_is_refused_at_once(scales, message):
  with pytest.raises(ConfigError, match=message):
    engine_config(kv_dtype=KV_DTYPE, kv_scales=scales)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 1), (1, 2, 4)])
def test_scales_of_another_model_are_refused(model, shape):
  message = (
    r"kv_scales must be \[L, 2, K\] = \[1, 2, 2\]: layers, keys and values, KV"
    rf" heads; got \[{shape[0]}, 2, {shape[2]}\]\."
  )
  with pytest.raises(ConfigError, match=message):
    placed(model, kv_dtype=KV_DTYPE, kv_scales=np.ones(shape))


@pytest.mark.parametrize("kv_dtype", [None, "float32", "bfloat16"])
def test_scales_of_what_needs_none_are_refused(kv_dtype):
  message = (
    "kv_dtype must be float8_e4m3fn where kv_scales are given; got"
    f" {kv_dtype!r}"
  )
  with pytest.raises(ConfigError, match=message):
    engine_config(kv_dtype=kv_dtype, kv_scales=RIGHT)


def test_a_file_that_holds_no_scales_is_refused(model, tmp_path):
  path = tmp_path / "scales.npy"

  def check(message):
    with pytest.raises(ConfigError, match=message):
      placed(model, kv_dtype=KV_DTYPE, kv_scales=str(path))

  check(r"kv_scales must be an array or a \.npy file of one; got '.*No such f")
  path.write_bytes(b"")
  check(r"kv_scales must be an array or a \.npy file of one; got '.*scales\.np")
  path.write_bytes(b"scales")
  check(r"kv_scales must be an array or a \.npy file of one; got '.*scales\.np")
  np.save(path, -RIGHT)
  check(r"kv_scales of .*scales\.npy\[0, 0, 0\] must be in .*; got -0\.5\.")
  np.save(path, np.ones((3, 2, 2)))
  check(r"kv_scales of .*scales\.npy must be \[L, 2, K\] = \[1, 2, 2\]")
  with path.open("wb") as file:
    np.savez(file, a=RIGHT, b=RIGHT)
  check(r"kv_scales must be a file of one array; got '.*', which has several")
