"""Drawn models: of the shape asked for, alike wherever they are drawn."""

import json

import jax
import numpy as np
import pytest

from infinite_llm import LLM, SamplingParams
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.member import load_model
from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models.dummy_weights import load_dummy
from infinite_llm.models.transformer import abstract_transformer

_SHAPE = {
  "architectures": ["Qwen3ForCausalLM"],
  "vocab_size": 48,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "dtype": "float32",
}


@pytest.fixture(name="folder")
def _folder(tmp_path):
  _write(tmp_path)
  return tmp_path


def _write(folder, **fields):
  text = json.dumps(_SHAPE | fields)
  (folder / "config.json").write_text(text, encoding="utf-8")


def _weights(model) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(model.state)]


def test_it_has_the_shape_that_the_folder_describes(folder):
  model = load_dummy(folder, make_mesh(1, 1), seed=0)

  assert model.config.num_layers == 2
  assert model.config.qk_norm
  assert model.dtype == np.float32
  assert model.tokenizer is None
  _, abstract = abstract_transformer(
    model.config, dtype=np.float32, tensor_axis="tensor"
  )
  assert [leaf.shape for leaf in _weights(model)] == [
    leaf.shape for leaf in jax.tree.leaves(abstract)
  ]
  spread = np.std(np.concatenate([leaf.ravel() for leaf in _weights(model)]))
  assert spread == pytest.approx(0.02, rel=0.05)


def test_weights_depend_on_the_seed_and_not_on_the_mesh(folder):
  one = _weights(load_dummy(folder, make_mesh(1, 1), seed=7))
  spread = _weights(load_dummy(folder, make_mesh(2, 2), seed=7))
  other = _weights(load_dummy(folder, make_mesh(1, 1), seed=8))

  assert all(map(np.array_equal, one, spread))
  assert not any(map(np.array_equal, one, other))


def test_weights_of_one_shape_differ(folder):
  state = load_dummy(folder, make_mesh(1, 1), seed=0).state
  first, second = (state["layers"][n]["mlp"] for n in (0, 1))
  for one, two in zip(
    jax.tree.leaves(first), jax.tree.leaves(second), strict=True
  ):
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
  ("named", "asked", "dtype"),
  [
    ({"dtype": "float16"}, None, "bfloat16"),
    ({"dtype": None, "torch_dtype": "float32"}, None, "float32"),
    ({"dtype": None}, None, "bfloat16"),
    ({"dtype": "float32"}, "bfloat16", "bfloat16"),
  ],
)
def test_its_dtype_is_what_is_asked_for_or_named(tmp_path, named, asked, dtype):
  _write(tmp_path, **named)
  model = load_dummy(tmp_path, make_mesh(1, 1), seed=0, dtype=asked)
  assert model.dtype.name == dtype


def test_an_engine_serves_it(folder):
  llm = LLM(
    folder,
    engine_config(
      load_format="dummy",
      block_size=16,
      num_blocks=9,
      max_num_seqs=1,
      decode_buckets=(1,),
      prefill_buckets=(32,),
    ),
    show_progress=False,
  )
  (output,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=4))
  assert len(output.token_ids) == 4


class TestErrors:
  def test_an_unknown_format(self):
    message = "load_format must be one of auto, dummy; got 'random'"
    with pytest.raises(ConfigError, match=message):
      engine_config(load_format="random")

  def test_a_folder_without_a_shape(self, tmp_path):
    config = engine_config(load_format="dummy")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
      load_model(tmp_path, config)

  def test_a_folder_without_weights_that_are_to_be_read(self, folder):
    with pytest.raises(CheckpointError, match=r"has neither model\.safetens"):
      load_model(folder, engine_config())

  def test_a_dtype_that_nothing_is_computed_with(self, tmp_path):
    _write(tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match=r"dtype must be one of .*'int8'"):
      load_dummy(tmp_path, make_mesh(1, 1), seed=0)
