import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models import checkpoint
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.models.transformer import param_specs
from infinite_llm.sampling_params import SamplingParams
from tests import testing


@pytest.fixture(scope="module")
def loaded():
  # Four KV heads: four tensor ranks can share them.
  return load_hf(testing.GOLDEN / "llama2", make_mesh(2, 2), dtype="float32")


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint") / "model"
  checkpoint.save(
    path,
    loaded.config,
    loaded.state,
    tokenizer=loaded.tokenizer,
    generation=dataclasses.replace(
      loaded.generation, sampling=SamplingParams(top_k=3, stop=("a",))
    ),
  )
  return path


def _state_as(loaded, dtype):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), loaded.state)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_on_any_mesh_in_any_dtype(
  loaded, saved, shape, dtype
):
  mesh = make_mesh(*shape)

  restored = checkpoint.restore(saved, mesh, dtype=dtype)

  assert jax.tree.structure(restored.state) == jax.tree.structure(loaded.state)
  jax.tree.map(
    np.testing.assert_array_equal,
    restored.state,
    _state_as(loaded, jnp.dtype(dtype)),
  )
  specs = param_specs(loaded.config, mesh)
  jax.tree.map(
    lambda leaf, spec: np.testing.assert_equal(
      leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), True
    ),
    restored.state,
    specs,
  )


def test_everything_but_the_weights_comes_back_too(loaded, saved):
  restored = checkpoint.restore(saved, make_mesh(1, 1))

  assert restored.config == loaded.config
  assert restored.generation == dataclasses.replace(
    loaded.generation, sampling=SamplingParams(top_k=3, stop=("a",))
  )
  assert restored.graphdef == loaded.graphdef
  assert restored.tokenizer.to_str() == loaded.tokenizer.to_str()


def test_the_saved_dtype_is_the_default(loaded, tmp_path):
  state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.state)
  checkpoint.save(tmp_path / "model", loaded.config, state)

  restored = checkpoint.restore(tmp_path / "model", make_mesh(1, 2))

  leaves = jax.tree.leaves(restored.state)
  assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
  assert restored.tokenizer is None


def test_an_existing_folder_is_not_overwritten(loaded, saved):
  with pytest.raises(CheckpointError, match=r"model exists already"):
    checkpoint.save(saved, loaded.config, loaded.state)


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_a_checkpoint_is_named(tmp_path, folder):
  with pytest.raises(CheckpointError, match=r"model\.json does not exist"):
    checkpoint.restore(tmp_path / folder, make_mesh(1, 1))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not readable JSON"),
    ('{"format": "other"}', "must have format 'infinite-llm-1'; found 'other'"),
    (
      '{"format": "infinite-llm-1", "config": {"vocab": 3}}',
      "holds a wrong config: ",
    ),
  ],
)
def test_a_wrong_model_file_is_refused(tmp_path, text, message):
  (tmp_path / "model.json").write_text(text)

  with pytest.raises(CheckpointError, match=rf"model\.json {message}"):
    checkpoint.restore(tmp_path, make_mesh(1, 1))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_layers": 4}, r"lacks tensor layers\.3\.input_layernorm\.weight of"),
    ({"num_layers": 2}, r"has tensor layers\.2\..*, which its configuration"),
    (
      {"mlp_dim": 100},
      r"mlp\.\w+\.weight must have shape .*100.* found .*96",
    ),
  ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(
  loaded, tmp_path, change, message
):
  config = dataclasses.replace(loaded.config, **change)
  checkpoint.save(tmp_path / "model", config, loaded.state)

  with pytest.raises(CheckpointError, match=message):
    checkpoint.restore(tmp_path / "model", make_mesh(1, 1))


def _largest_file(folder):
  files = [file for file in folder.rglob("*") if file.is_file()]
  return max(files, key=lambda file: file.stat().st_size)


def test_a_truncated_file_is_named_with_both_sizes(saved, tmp_path):
  damaged = shutil.copytree(saved, tmp_path / "model")
  file = _largest_file(damaged / "weights")
  content = file.read_bytes()
  file.write_bytes(content[:-1])

  message = f"{file.name} must have {len(content)} bytes; found "
  with pytest.raises(CheckpointError, match=f"{message}{len(content) - 1}"):
    checkpoint.restore(damaged, make_mesh(1, 1))


@pytest.mark.parametrize(
  "field", ["config", "dtype", "tokenizer", "generation", "bytes"]
)
def test_a_missing_field_is_named(saved, tmp_path, field):
  model = json.loads((saved / "model.json").read_text())
  del model[field]
  (tmp_path / "model.json").write_text(json.dumps(model))

  message = rf"model\.json has no field '{field}'"
  with pytest.raises(CheckpointError, match=message):
    checkpoint.restore(tmp_path, make_mesh(1, 1))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("config", []),
    ("dtype", "int8"),
    ("dtype", {}),
    ("tokenizer", 5),
    ("tokenizer", "{}"),
    ("generation", {"eos_token": "</s>", "end": 2}),
    ("generation", {"eos_token_ids": ["x"]}),
    ("generation", {"sampling": {"temperature": -1}}),
    ("bytes", 5),
    ("bytes", {"weights/a": "5"}),
  ],
)
def test_a_wrong_field_is_named(saved, tmp_path, field, value):
  model = json.loads((saved / "model.json").read_text())
  model[field] = value
  (tmp_path / "model.json").write_text(json.dumps(model))

  message = rf"model\.json holds a wrong {field}: "
  with pytest.raises(CheckpointError, match=message):
    checkpoint.restore(tmp_path, make_mesh(1, 1))


def test_a_checkpoint_from_before_sampling_was_kept_is_greedy(saved, tmp_path):
  older = shutil.copytree(saved, tmp_path / "model")
  model = json.loads((older / "model.json").read_text())
  del model["generation"]["sampling"]
  (older / "model.json").write_text(json.dumps(model))

  restored = checkpoint.restore(older, make_mesh(1, 1))

  assert restored.generation.sampling == SamplingParams()


def test_a_missing_file_is_named(saved, tmp_path):
  damaged = shutil.copytree(saved, tmp_path / "model")
  file = _largest_file(damaged / "weights")
  file.unlink()

  with pytest.raises(CheckpointError, match=f"{file.name} does not exist"):
    checkpoint.restore(damaged, make_mesh(1, 1))


def test_an_unsupported_dtype_is_refused(saved):
  with pytest.raises(ConfigError, match=r"float32, bfloat16; got 'int8'"):
    checkpoint.restore(saved, make_mesh(1, 1), dtype="int8")


def test_a_mesh_that_splits_heads_unevenly_is_refused(saved):
  with pytest.raises(ConfigError, match=r"num_q_heads .* \(3\); got 4"):
    checkpoint.restore(saved, make_mesh(1, 3))
