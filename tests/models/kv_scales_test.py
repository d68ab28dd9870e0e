"""Scales of keys and values come with a checkpoint, under several names."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import CheckpointError
from infinite_llm.models import checkpoint
from infinite_llm.models.hf_loader import load_hf
from tests.testing import write_shallow_checkpoint

LAYERS, HEADS = 2, 2
NAMES = {
  "compressed-tensors": ("k_scale", "v_scale"),
  "vLLM": ("attn.k_scale", "attn.v_scale"),
  "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
  "AutoFP8": ("k_proj.output_scale", "v_proj.output_scale"),
}
OF_KV_ALONE = {
  "quant_method": "compressed-tensors",
  "format": "dense",
  "config_groups": {},
  "kv_cache_scheme": {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
  },
}


@pytest.fixture(name="folder")
def _folder(tmp_path):
  return write_shallow_checkpoint(tmp_path, num_layers=LAYERS)


def add(folder, scales):
  file = folder / "model.safetensors"
  prefixed = {
    f"model.layers.{name}": np.asarray(x) for name, x in scales.items()
  }
  save_file(load_file(file) | prefixed, file)


def scales_of(names=NAMES["compressed-tensors"], shape=(1,), dtype=np.float32):
  """By name, 0.25, 0.5 and so on; all numbers of one are different."""
  size = int(np.prod(shape))
  return {
    f"{layer}.self_attn.{name}": (
      np.arange(1, size + 1).reshape(shape) * 2.0 ** (2 * layer + i - 2)
    ).astype(dtype)
    for layer in range(LAYERS)
    for i, name in enumerate(names)
  }


def load(folder):
  return load_hf(folder, make_mesh(1, 1), dtype="float32")


@pytest.mark.parametrize("writer", NAMES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_of_a_layer_is_that_of_all_its_heads(folder, writer, shape):
  add(folder, scales_of(NAMES[writer], shape))
  expected = [[[0.25] * HEADS, [0.5] * HEADS], [[1.0] * HEADS, [2.0] * HEADS]]
  scales = load(folder).kv_scales
  assert scales.dtype == np.float32
  np.testing.assert_array_equal(scales, expected)


@pytest.mark.parametrize("shape", [(HEADS,), (HEADS, 1, 1), (1, HEADS, 1, 1)])
def test_each_head_may_have_its_own(folder, shape):
  add(folder, scales_of(shape=shape, dtype=ml_dtypes.bfloat16))
  expected = [[[0.25, 0.5], [0.5, 1.0]], [[1.0, 2.0], [2.0, 4.0]]]
  np.testing.assert_array_equal(load(folder).kv_scales, expected)


def test_a_checkpoint_without_scales_has_none(folder):
  assert load(folder).kv_scales is None


def test_scales_of_queries_are_left_alone(folder):
  add(folder, {"0.self_attn.q_scale": np.float32([0.1])})
  assert load(folder).kv_scales is None


def change(**changes):
  return lambda scales: (
    scales
    | {
      f"0.self_attn.{name}": np.float32(value)
      for name, value in changes.items()
    }
  )


def lose_one(scales):
  del scales["1.self_attn.v_scale"]
  return scales


def name_one_twice(scales):
  return scales | {"1.self_attn.attn.k_scale": np.float32([1])}


def add_a_layer(scales):
  return scales | {"2.self_attn.k_scale": np.float32([1])}


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (change(k_scale=[0]), r"0\.self_attn\.k_scale\[0\] must be in .* got 0\.0"),
    (change(v_scale=-1), r"0\.self_attn\.v_scale must be in .*; got -1\.0\."),
    (change(v_scale=[1, np.nan]), r"v_scale\[1\] must be in .*; got nan\."),
    (
      change(k_scale=[1, 1, 1]),
      r"k_scale must have 1 number or one for each of 2 KV heads; found shape"
      r" \[3\]\.",
    ),
    (lose_one, "Layer 1 has no v_scale, but other layers have scales"),
    (name_one_twice, "are two scales of the same numbers"),
    (add_a_layer, r"layers\.2\.self_attn\.k_scale is of a layer beyond the 2"),
  ],
)
def test_wrong_scales_are_refused(folder, damage, message):
  add(folder, damage(scales_of()))
  with pytest.raises(CheckpointError, match=message):
    load(folder)


def set_quantization(folder, quantization):
  file = folder / "config.json"
  config = json.loads(file.read_text()) | {"quantization_config": quantization}
  file.write_text(json.dumps(config))


def test_a_checkpoint_that_says_so_of_its_cache_alone_is_loaded(folder):
  set_quantization(folder, OF_KV_ALONE)
  add(folder, scales_of())
  assert load(folder).kv_scales is not None


@pytest.mark.parametrize(
  "changes",
  [
    {"quant_method": "gptq"},
    {"quant_algo": "FP8"},
    {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
    {"kv_cache_scheme": {"num_bits": 4, "type": "float"}},
    {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
    {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}},
  ],
  ids=str,
)
def test_any_other_quantization_is_refused(folder, changes):
  set_quantization(folder, OF_KV_ALONE | changes)
  with pytest.raises(
    CheckpointError, match=r"quantization_config=.* is not im"
  ):
    load(folder)


def test_an_own_checkpoint_keeps_them(folder, tmp_path):
  add(folder, scales_of())
  model = load(folder)
  path = tmp_path / "own"
  checkpoint.save(path, model.config, model.state, kv_scales=model.kv_scales)
  mesh = make_mesh(1, 1)
  restored = checkpoint.restore(path, mesh)
  np.testing.assert_array_equal(restored.kv_scales, model.kv_scales)
  file = path / "model.json"
  text = file.read_text()
  content = json.loads(text)
  content["kv_scales"][0][0][0] = -1.0
  file.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match=r"wrong scales: .* got -1\.0"):
    checkpoint.restore(path, mesh)
  del content["kv_scales"]  # As folders from before there were scales.
  file.write_text(json.dumps(content))
  assert checkpoint.restore(path, mesh).kv_scales is None
