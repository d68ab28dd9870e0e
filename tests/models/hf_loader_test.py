import collections
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import CheckpointError, ConfigError
from infinite_llm.models import hf_loader
from infinite_llm.models.hf_loader import load_hf, param_specs
from infinite_llm.models.loaded_model import GenerationDefaults
from infinite_llm.sampling_params import SamplingParams
from tests import testing


def _load(path, mesh=None, dtype="float32"):
  return load_hf(path, make_mesh(1, 1) if mesh is None else mesh, dtype=dtype)


@pytest.fixture
def folder(tmp_path):
  """A copy of a tied model in one file, to be damaged."""
  return shutil.copytree(testing.GOLDEN / "llama3", tmp_path / "model")


@pytest.fixture
def sharded_folder(tmp_path):
  """A copy of a model in several files with an index."""
  return shutil.copytree(testing.GOLDEN / "qwen2", tmp_path / "model")


def _edit_json(file, **changes):
  content = json.loads(file.read_text())
  content.update(changes)
  file.write_text(json.dumps(content))


def _edit_tensors(folder, edit):
  file = folder / "model.safetensors"
  tensors = load_file(file)
  edit(tensors)
  save_file(tensors, file)


class _CountingFile:
  """A safetensors file that notes which elements are read."""

  def __init__(self, file, reads):
    self._file = file
    self._reads = reads

  def __enter__(self):
    self._file.__enter__()
    return self

  def __exit__(self, *args):
    return self._file.__exit__(*args)

  def keys(self):
    return self._file.keys()

  def get_slice(self, name):
    return _CountingSlice(name, self._file.get_slice(name), self._reads)


class _CountingSlice:
  def __init__(self, name, source, reads):
    self._name = name
    self._source = source
    self._reads = reads

  def get_shape(self):
    return self._source.get_shape()

  def get_dtype(self):
    return self._source.get_dtype()

  def __getitem__(self, index):
    self._reads[self._name].append(index)
    return self._source[index]


@pytest.fixture
def reads(monkeypatch):
  """Slices read from the files, by tensor."""
  noted = collections.defaultdict(list)

  def counting_open(*args, **kwargs):
    return _CountingFile(safe_open(*args, **kwargs), noted)

  safe_open = hf_loader.safe_open
  monkeypatch.setattr(hf_loader, "safe_open", counting_open)
  return noted


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_each_element_is_read_from_the_file_once(reads, shape):
  _load(testing.GOLDEN / "llama2", make_mesh(*shape))

  stored = load_file(testing.GOLDEN / "llama2" / "model.safetensors")
  assert reads.keys() == stored.keys()
  for name, slices in reads.items():
    counts = np.zeros(stored[name].shape, np.int32)
    for index in slices:
      counts[index] += 1
    assert (counts == 1).all(), name


def test_a_tensor_rank_reads_only_its_shard(reads):
  _load(testing.GOLDEN / "llama2", make_mesh(2, 2))

  assert len(reads["model.layers.0.self_attn.q_proj.weight"]) == 2
  assert len(reads["model.layers.0.self_attn.o_proj.weight"]) == 2
  assert len(reads["model.layers.0.input_layernorm.weight"]) == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_weights_are_those_of_the_files_where_the_specs_say(shape):
  mesh = make_mesh(*shape)

  loaded = _load(testing.GOLDEN / "qwen3", mesh)

  stored = load_file(testing.GOLDEN / "qwen3" / "model.safetensors")
  layer = loaded.state["layers"][2]
  np.testing.assert_array_equal(
    layer["mlp"]["down_proj"]["weight"],
    stored["model.layers.2.mlp.down_proj.weight"],
  )
  np.testing.assert_array_equal(
    loaded.state["lm_head"]["weight"], stored["lm_head.weight"]
  )
  jax.tree.map(
    lambda leaf, spec: np.testing.assert_equal(
      leaf.sharding, NamedSharding(mesh, spec)
    ),
    loaded.state,
    param_specs(loaded.config, mesh),
  )


def test_weights_are_sharded_over_tensor_ranks_only():
  loaded = _load(testing.GOLDEN / "qwen2", make_mesh(1, 1))

  specs = param_specs(loaded.config, make_mesh(2, 2))

  layer = specs["layers"][0]
  assert layer["self_attn"]["k_proj"]["weight"] == PartitionSpec("tensor", None)
  assert layer["self_attn"]["k_proj"]["bias"] == PartitionSpec("tensor")
  assert layer["self_attn"]["o_proj"]["weight"] == PartitionSpec(None, "tensor")
  assert layer["input_layernorm"]["weight"] == PartitionSpec()
  assert specs["embed_tokens"]["weight"] == PartitionSpec("tensor", None)


def test_an_indivisible_vocabulary_is_replicated(folder):
  def cut(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:255])

  _edit_tensors(folder, cut)
  _edit_json(folder / "config.json", vocab_size=255)

  loaded = _load(folder, make_mesh(1, 2))

  assert loaded.state["embed_tokens"]["weight"].sharding.is_fully_replicated


def test_bfloat16_files_load_exactly(folder):
  def cast(tensors):
    for name, tensor in tensors.items():
      tensors[name] = tensor.astype(ml_dtypes.bfloat16)

  _edit_tensors(folder, cast)

  exact, wide = _load(folder, dtype="bfloat16"), _load(folder, dtype="float32")

  stored = load_file(folder / "model.safetensors")["model.norm.weight"]
  assert exact.state["norm"]["weight"].dtype.name == "bfloat16"
  np.testing.assert_array_equal(exact.state["norm"]["weight"], stored)
  np.testing.assert_array_equal(
    wide.state["norm"]["weight"], stored.astype(np.float32)
  )


@pytest.mark.parametrize(
  ("stored", "loaded"),
  [
    ("float32", "float32"),
    ("float64", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "bfloat16"),
  ],
)
def test_without_a_dtype_the_checkpoints_own_is_kept(folder, stored, loaded):
  def cast(tensors):
    for name, tensor in tensors.items():
      tensors[name] = tensor.astype(ml_dtypes.bfloat16).astype(stored)

  _edit_tensors(folder, cast)

  model = _load(folder, dtype=None)

  assert model.dtype.name == loaded
  assert {leaf.dtype.name for leaf in jax.tree.leaves(model.state)} == {loaded}


def test_a_head_equal_to_its_tied_embedding_is_accepted(folder):
  def copy(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

  _edit_tensors(folder, copy)

  assert "lm_head" not in _load(folder).state


def test_frequencies_of_old_checkpoints_are_ignored(folder):
  def add(tensors):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = np.zeros(8, np.float32)

  _edit_tensors(folder, add)

  assert _load(folder).config.rope.scaling == "llama3"


def test_the_tokenizer_and_defaults_for_generation_are_read():
  loaded = _load(testing.GOLDEN / "llama3")

  text = "Where lies rBlock 7? Überall."
  assert loaded.tokenizer.decode(loaded.tokenizer.encode(text).ids) == text
  assert loaded.generation == GenerationDefaults(
    eos_token_ids=(2,),
    bos_token_id=1,
    bos_token="<s>",
    eos_token="</s>",
    chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% endfor %}",
  )


def test_all_but_the_weights_is_optional(folder):
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (folder / name).unlink()
  (folder / "generation_config.json").unlink()

  loaded = _load(folder)

  assert loaded.tokenizer is None
  assert loaded.generation == GenerationDefaults(
    eos_token_ids=(2,), bos_token_id=1
  )


def test_the_generation_config_wins_over_the_model_config(folder):
  _edit_json(folder / "generation_config.json", eos_token_id=[7, 9])

  assert _load(folder).generation.eos_token_ids == (7, 9)


def test_requests_are_greedy_unless_the_makers_sample(folder):
  file = folder / "generation_config.json"
  likes = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_new_tokens": 7}

  _edit_json(file, do_sample=False, repetition_penalty=1.5, **likes)
  greedy = SamplingParams(repetition_penalty=1.5, max_tokens=7)
  assert _load(folder).generation.sampling == greedy

  _edit_json(file, do_sample=True)
  assert _load(folder).generation.sampling == SamplingParams(
    temperature=0.6,
    top_p=0.9,
    top_k=50,
    repetition_penalty=1.5,
    max_tokens=7,
  )

  file.write_text('{"do_sample": true, "top_k": null}')
  assert _load(folder).generation.sampling == SamplingParams(temperature=1.0)


def test_end_tokens_named_only_as_text_are_looked_up(folder):
  for name in ("config.json", "generation_config.json"):
    _edit_json(folder / name, eos_token_id=None, bos_token_id=None)

  generation = _load(folder).generation

  assert (generation.eos_token_ids, generation.bos_token_id) == ((2,), 1)


def test_chat_templates_are_found_in_a_file_or_a_list(folder):
  templates = [
    {"name": "tools", "template": "t"},
    {"name": "default", "template": "d"},
  ]
  _edit_json(folder / "tokenizer_config.json", chat_template=templates)
  assert _load(folder).generation.chat_template == "d"

  (folder / "chat_template.jinja").write_text("from the file")
  assert _load(folder).generation.chat_template == "from the file"


# What is wrong with a checkpoint is said with its file, tensor and shapes.


def test_a_missing_config_is_named(tmp_path):
  with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
    _load(tmp_path)


def test_a_broken_config_is_named(folder):
  (folder / "config.json").write_text("{")

  with pytest.raises(CheckpointError, match=r"config\.json is not readable"):
    _load(folder)


def test_an_unknown_architecture_is_named(folder):
  _edit_json(folder / "config.json", architectures=["RwkvForCausalLM"])

  with pytest.raises(CheckpointError, match="architecture: RwkvForCausalLM"):
    _load(folder)


def test_missing_weights_are_named(folder):
  (folder / "model.safetensors").unlink()

  message = r"has neither model\.safetensors nor model\.safetensors\.index"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


@pytest.mark.parametrize("kept_bytes", [3, 100, -1])
def test_a_truncated_file_is_named(folder, kept_bytes):
  file = folder / "model.safetensors"
  content = file.read_bytes()[:kept_bytes]
  file.write_bytes(content)

  message = rf"model\.safetensors \({len(content)} bytes\) is truncated"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


def test_a_missing_part_is_named(sharded_folder):
  part = sorted(sharded_folder.glob("model-00002-of-*.safetensors"))[0]
  part.unlink()

  with pytest.raises(CheckpointError, match=f"{part.name} does not exist"):
    _load(sharded_folder)


def test_an_index_that_promises_too_much_is_named(sharded_folder):
  index = sharded_folder / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  file_name = weight_map["model.layers.0.mlp.up_proj.weight"]
  assert weight_map["model.norm.weight"] != file_name
  weight_map["model.norm.weight"] = file_name
  _edit_json(index, weight_map=weight_map)

  message = rf"{file_name} lacks tensor model\.norm\.weight, which"
  with pytest.raises(CheckpointError, match=message):
    _load(sharded_folder)


def test_an_index_whose_map_names_no_file_is_named(sharded_folder):
  index = sharded_folder / "model.safetensors.index.json"
  _edit_json(index, weight_map={"model.norm.weight": 5})

  message = r"index\.json: weight_map must name a file .*; got 5 for model\.nor"
  with pytest.raises(CheckpointError, match=message):
    _load(sharded_folder)


def test_an_index_without_a_map_is_named(sharded_folder):
  _edit_json(sharded_folder / "model.safetensors.index.json", weight_map=None)

  with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
    _load(sharded_folder)


def test_a_missing_tensor_is_named_with_its_shape(folder):
  _edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))

  message = r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight of shape "
  with pytest.raises(CheckpointError, match=message + r"\[96, 64\]\."):
    _load(folder)


def test_a_missing_head_is_named_where_the_embedding_is_not_tied(folder):
  _edit_json(folder / "config.json", tie_word_embeddings=False)

  with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
    _load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
  name = "model.layers.2.self_attn.k_proj.weight"
  _edit_tensors(folder, lambda t: t.update({name: np.zeros((16, 64), "f4")}))

  message = r"k_proj\.weight must have shape \[32, 64\] .* found \[16, 64\]"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


def _store_as(folder, name, dtype):
  """Rewrites one tensor of a file as zeros of a dtype that NumPy may lack."""
  file = folder / "model.safetensors"
  tensors = load_file(file)
  item_bytes = 4 if dtype == "I32" else 1
  header, data = {}, b""
  for key, tensor in tensors.items():
    is_odd = key == name
    part = bytes(tensor.size * item_bytes) if is_odd else tensor.tobytes()
    header[key] = {
      "dtype": dtype if is_odd else "F32",
      "shape": tensor.shape,
      "data_offsets": [len(data), len(data) + len(part)],
    }
    data += part
  text = json.dumps(header).encode()
  # Eight bytes of length, the header, the data: that is the whole format.
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("asked", ["float32", None])
@pytest.mark.parametrize("dtype", ["I8", "I32", "BOOL", "F8_E4M3"])
@pytest.mark.parametrize(
  "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_no_plain_floats_are_named(folder, name, dtype, asked):
  _store_as(folder, name, dtype)

  message = rf"model\.safetensors: {name} must be stored as .*; found {dtype}\."
  with pytest.raises(CheckpointError, match=message):
    _load(folder, dtype=asked)


def test_tensors_that_the_model_would_ignore_are_named(folder):
  name = "model.layers.0.self_attn.q_proj.bias"
  _edit_tensors(folder, lambda t: t.update({name: np.zeros(64, "f4")}))

  message = r"has tensor .*q_proj\.bias, which .* does not use"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


def test_a_head_that_differs_from_its_tied_embedding_is_refused(folder):
  def differ(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][255, 63] += 1

  _edit_tensors(folder, differ)

  message = r"lm_head\.weight differs from model\.embed_tokens\.weight"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


def test_a_head_of_another_shape_than_its_tied_embedding_is_refused(folder):
  name = "lm_head.weight"
  _edit_tensors(folder, lambda t: t.update({name: np.zeros((9, 64), "f4")}))

  message = r"lm_head\.weight must have shape \[256, 64\] .* found \[9, 64\]"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


def test_a_broken_tokenizer_is_named(folder):
  (folder / "tokenizer.json").write_text("{}")

  message = r"tokenizer\.json is not a tokenizer"
  with pytest.raises(CheckpointError, match=message):
    _load(folder)


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    (
      "generation_config",
      {"eos_token_id": "x"},
      r"eos_token_id must .*; got 'x",
    ),
    (
      "generation_config",
      {"eos_token_id": 1.5},
      r"eos_token_id must .* got 1\.5",
    ),
    ("generation_config", {"eos_token_id": [True]}, r"eos_token_id .*\[True\]"),
    (
      "generation_config",
      {"bos_token_id": {"a": 1}},
      r"bos_token_id .*\{'a': 1",
    ),
    ("config", {"bos_token_id": -1}, r"bos_token_id must be a .* got -1"),
    ("generation_config", {"do_sample": "no"}, r"do_sample must .*; got 'no'"),
    (
      "generation_config",
      {"do_sample": True, "top_p": 2},
      r"top_p must be in \(0, 1\]; got 2",
    ),
    ("tokenizer_config", {"eos_token": {"foo": 1}}, r"eos_token must .*'foo'"),
    (
      "tokenizer_config",
      {"eos_token": 5},
      r"eos_token must be a text .* got 5",
    ),
    ("tokenizer_config", {"chat_template": 5}, r"chat_template must .* got 5"),
    ("tokenizer_config", {"chat_template": [{"a": 1}]}, r"chat_template must"),
  ],
)
def test_wrong_defaults_for_generation_are_named(folder, file, fields, message):
  if file == "config":  # The more specific file would win.
    _edit_json(folder / "generation_config.json", bos_token_id=None)
  _edit_json(folder / f"{file}.json", **fields)

  with pytest.raises(CheckpointError, match=rf"/{file}\.json: {message}"):
    _load(folder)


@pytest.mark.parametrize(
  "name", ["chat_template.jinja", "config.json", "generation_config.json"]
)
def test_text_that_is_not_utf_8_is_named(folder, name):
  (folder / name).write_bytes(b"{\xfc}")

  with pytest.raises(CheckpointError, match=rf"{name} is not readable UTF-8"):
    _load(folder)


def test_an_unsupported_dtype_is_refused(folder):
  with pytest.raises(ConfigError, match=r"float32, bfloat16; got 'float16'"):
    _load(folder, dtype="float16")


def test_tensor_ranks_that_split_heads_unevenly_are_refused(folder):
  message = r"num_q_heads must be a multiple of tensor_parallel \(3\); got 4"
  with pytest.raises(ConfigError, match=message):
    _load(folder, make_mesh(1, 3))
