"""What cannot work is refused at the door, in words, and leaves nothing."""

import gc
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import run
from infinite_llm import LLM, EngineConfig, SamplingParams
from infinite_llm.config import engine_config
from infinite_llm.errors import CheckpointError, ConfigError
from tests.testing import write_shallow_checkpoint


@pytest.fixture(scope="module", name="sound")
def _sound_checkpoint(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture(name="folder")
def _own_checkpoint(tmp_path):
  """A checkpoint to break."""
  return write_shallow_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module", autouse=True)
def _frozen():
  """Spares collections what lived before: engines of other modules."""
  gc.collect()
  gc.freeze()


@pytest.fixture(autouse=True)
def _no_half_state():
  """An `LLM` that was refused holds nothing on any device."""
  gc.collect()
  before = len(jax.live_arrays())
  yield
  gc.collect()
  assert len(jax.live_arrays()) <= before


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"num_instances": 5},
      r"must not exceed the number of devices; got 5 x 1 = 5 with 4 devices\.",
    ),
    (
      {"num_instances": 2, "tensor_parallel": 3},
      r"got 2 x 3 = 6 with 4 devices\.",
    ),
    ({"num_instances": 0}, r"num_instances must be at least 1; got 0\."),
    ({"num_instances": "2"}, r"num_instances must be an integer; got '2'\."),
    (
      {"block_size": 17},
      r"block_size must be a positive multiple of 8; got 17\.",
    ),
    ({"block_size": -8}, r"block_size must be a positive .*; got -8\."),
    ({"num_blocks": 2.5}, r"num_blocks must be an integer; got 2\.5\."),
    (
      {"num_blocks": 2**33},
      r"num_blocks x block_size must fit on the devices; got 8589934592 x 64,",
    ),
    ({"memory_fraction": 0}, r"memory_fraction must be in \(0, 1\]; got 0\."),
    ({"num_blocks": 1}, r"num_blocks must be at least 2; got 1\."),
    (
      {"dtype": "int8"},
      r"dtype must be one of auto, float32, bfloat16; got 'int8'",
    ),
    (
      {"kv_dtype": "fp8"},
      r"kv_dtype must be None or one of float32, bfloat16, float8_e4m3fn; got"
      r" 'fp8'\.",
    ),
    (
      {"kv_dtype": "float8_e4m3fn", "kv_scales": np.zeros((1, 2, 2))},
      r"kv_scales\[0, 0, 0\] must be in .*; got 0\.0\.",
    ),
    (
      {"kv_dtype": "float8_e4m3fn", "kv_scales": np.ones((3, 2, 2))},
      r"kv_scales must be \[L, 2, K\] = \[1, 2, 2\]: .*; got \[3, 2, 2\]\.",
    ),
    (
      {"kv_scales": np.ones((1, 2, 2))},
      r"kv_dtype must be float8_e4m3fn where kv_scales are given; got None\.",
    ),
    ({"host_blocks": 1}, r"host_blocks must be 0 or at least 2; got 1\."),
    ({"host_blocks": -1}, r"host_blocks must be 0 or at least 2; got -1\."),
    (
      {"host_attention": True},
      r"host_blocks must be at least 2 with host_attention, .*; got 0\.",
    ),
    (
      {"host_attention": "no", "host_blocks": 8},
      r"host_attention must be True or False; got 'no'\.",
    ),
    (
      {"host_attention_share": True},
      r"host_attention_share must be a number; got True\.",
    ),
    (
      {"host_attention_share": 0},
      r"host_attention_share must be in \(0, 1\]; got 0\.",
    ),
    (
      {"host_link_bytes_per_s": 0},
      r"host_link_bytes_per_s must be positive and finite; got 0\.",
    ),
    (
      {"recompute_tokens_per_s": float("nan")},
      r"recompute_tokens_per_s must be positive and finite; got nan\.",
    ),
    ({"headroom_blocks": 1.5}, r"headroom_blocks must be an integer; got 1\.5"),
    (
      {"max_lent_blocks": -1},
      r"max_lent_blocks must be None or not negative; got -1\.",
    ),
    ({"policy": "give"}, r"policy must be one of borrow, .*; got 'give'\."),
    (
      {"decode_buckets": (4, 2)},
      r"decode_buckets must be positive, rising and not empty; got \(4, 2\)\.",
    ),
    (
      {"max_num_seqs": 32},
      r"decode_buckets\[-1\] must be at least max_num_seqs \(32\); got 16\.",
    ),
    (
      {"group_prefill_buckets": (128, 2048)},
      r"group_prefill_buckets\[-1\] must be at most 1024; got 2048\.",
    ),
    (
      {"group_prefill_buckets": ()},
      r"group_prefill_buckets must be positive, .* not empty; got \(\)\.",
    ),
    (
      {"group_chunk_s": 0.0},
      r"group_chunk_s must be positive and finite; got 0\.0\.",
    ),
    (
      {"num_instances": 65, "spill_slots": 8},
      r"num_instances x spill_slots must be at most 512, .*; got 520\.",
    ),
    ({"max_logprobs": 21}, r"max_logprobs must be in \[0, 20\]; got 21\."),
    (
      {"num_instnaces": 2},
      r"no option 'num_instnaces'; did you mean 'num_instances'\?",
    ),
    ({"blocksize": 16}, r"no option 'blocksize'; did you mean 'block_size'\?"),
    ({"xyzzy": 16}, r"There is no option 'xyzzy'\."),
    (
      {"config": EngineConfig(), "num_instances": 2},
      r"Give either config or options; got both: num_instances\.",
    ),
    (
      {"config": {"num_instances": 2}},
      r"config must be an EngineConfig; got \{'num_instances': 2\}\.",
    ),
    (
      {"tensor_parallel": 3},
      r"num_q_heads",
    ),
  ],
)
def test_a_configuration_that_cannot_work_is_refused(sound, options, message):
  with pytest.raises(ConfigError, match=message):
    LLM(model=sound, show_progress=False, **options)


def truncate(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1000])


def lose_a_tensor(folder):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  del tensors["model.layers.0.self_attn.k_proj.weight"]
  safetensors.numpy.save_file(tensors, file)


def change_a_shape(folder):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.norm.weight"] = np.ones(63, np.float32)
  safetensors.numpy.save_file(tensors, file)


def rename_the_architecture(folder):
  config = json.loads((folder / "config.json").read_text())
  config["architectures"] = ["GPT5ForCausalLM"]
  config["model_type"] = "gpt5"
  (folder / "config.json").write_text(json.dumps(config))


def lose_the_weights(folder):
  (folder / "model.safetensors").unlink()


def garble_the_config(folder):
  (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (truncate, r"model\.safetensors \(\d+ bytes\) is truncated"),
    (lose_a_tensor, r"lacks tensor model\.layers\.0\.self_attn\.k_proj\.wei"),
    (change_a_shape, r"model\.norm\.weight must have shape \[64\].*\[63\]"),
    (rename_the_architecture, r"GPT5ForCausalLM|gpt5"),
    (lose_the_weights, r"has neither model\.safetensors nor"),
    (garble_the_config, r"config\.json is not readable JSON"),
  ],
)
def test_a_damaged_checkpoint_is_refused(folder, damage, message):
  damage(folder)
  with pytest.raises(CheckpointError, match=message):
    LLM(model=folder, num_instances=2, show_progress=False)


def test_a_folder_that_is_not_there_is_named(tmp_path):
  with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not"):
    LLM(model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
  ("name", "value", "rule"),
  [
    ("memory_fraction", "x", "a number"),
    ("host_link_bytes_per_s", "x", "a number"),
    ("recompute_tokens_per_s", None, "a number"),
    ("verify_moves", "yes", "True or False"),
    ("performance_profile", 5, "None or a text"),
    ("group_chunk_s", "x", "a number"),
    ("resend_after_s", True, "a number"),
    ("lease_s", "x", "a number"),
    ("expire_after_s", [1.0], "a number"),
    ("leader_lease", 0, "in (0, 0.8]"),
    ("group_prefill_buckets", "128", "a sequence of integers"),
    ("decode_buckets", 5, "a sequence of integers"),
    ("decode_buckets", {4: 1}, "a sequence of integers"),
    ("prefill_buckets", None, "a sequence of integers"),
    ("seed", "x", "an integer"),
    ("seed", 1.5, "an integer"),
    ("max_logprobs", "3", "an integer"),
    ("max_logprobs", 2.5, "an integer"),
  ],
)
def test_an_option_of_a_wrong_type_is_named(name, value, rule):
  message = f"^{re.escape(f'{name} must be {rule}; got {value!r}.')}$"
  with pytest.raises(ConfigError, match=message):
    engine_config(**{name: value})


@pytest.mark.parametrize("name", ["cache", "lending", "scheduler"])
def test_a_part_of_a_configuration_must_be_one(name):
  with pytest.raises(ConfigError, match=rf"{name} must be a \w+Config; got 5"):
    EngineConfig(**{name: 5})


@pytest.mark.parametrize("model", [None, 5, b"model"])
def test_a_model_that_is_no_path_is_refused(model):
  with pytest.raises(ConfigError, match=rf"model must be the .* got {model}\."):
    LLM(model=model)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_tokens": 0}, r"max_tokens must be at least 1; got 0\."),
    ({"max_tokens": 1.5}, r"max_tokens must be an integer; got 1\.5\."),
    ({"max_tokens": True}, r"max_tokens must be an integer; got True\."),
    ({"temperature": True}, r"temperature must be a number; got True\."),
    ({"stop_token_ids": [True]}, r"stop_token_ids must .*; got \[True\]\."),
    ({"ignore_eos": "no"}, r"ignore_eos must be True or False; got 'no'\."),
    (
      {"include_stop_str_in_output": 1},
      r"include_stop_str_in_output must be True or False; got 1\.",
    ),
    (
      {"skip_special_tokens": None},
      r"skip_special_tokens must be True or False; got None\.",
    ),
    ({"max_tokens": None}, r"max_tokens must be an integer; got None\."),
    ({"temperature": -0.1}, r"temperature must be .* not negative; got -0\.1"),
    ({"temperature": float("nan")}, r"temperature must be finite .*; got nan"),
    ({"temperature": float("inf")}, r"temperature must be finite .*; got inf"),
    ({"temperature": "hot"}, r"temperature must be a number; got 'hot'\."),
    ({"top_k": -1}, r"top_k must be not negative .*; got -1\."),
    ({"top_p": 0}, r"top_p must be in \(0, 1\]; got 0\."),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\]; got 1\.1\."),
    ({"min_p": -0.5}, r"min_p must be in \[0, 1\]; got -0\.5\."),
    ({"repetition_penalty": 0}, r"repetition_penalty must be .*; got 0\."),
    ({"seed": -1}, r"seed must be None or in \[0, 2\*\*32\); got -1\."),
    ({"seed": 2**32}, r"seed must be None or in \[0, 2\*\*32\); got 42949"),
    ({"seed": 0.5}, r"seed must be None or an integer; got 0\.5\."),
    ({"stop": ""}, r"stop must be made of non-empty strings; got \('',\)\."),
    ({"stop": [3]}, r"stop must be a string or a sequence of them; got \[3\]"),
    ({"stop_token_ids": 3}, r"stop_token_ids must be a sequence of int.* 3\."),
    ({"stop_token_ids": "3"}, r"stop_token_ids must be .*; got '3'\."),
    ({"logprobs": 21}, r"logprobs must be None or in \[0, 20\]; got 21\."),
    ({"logprobs": -1}, r"logprobs must be None or in \[0, 20\]; got -1\."),
  ],
)
def test_sampling_that_means_nothing_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    SamplingParams(**options)


def quickstart(tmp_path, *args) -> list[str]:
  return [
    "--config=configs/quickstart.py",
    f"--workdir={tmp_path / 'out'}",
    "--config.show_progress=false",
    *args,
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "must hold some text"),
    (b" \n\t\n", "must hold some text"),
    ("Grüße".encode("latin-1"), "has byte 0xfc at offset 2"),
  ],
)
def test_a_document_that_is_no_text_is_refused(
  tmp_path, capsys, content, message
):
  document = tmp_path / "document.txt"
  document.write_bytes(content)
  args = quickstart(tmp_path, f"--config.document.path={document}")
  assert run.main(["run", *args]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert str(document) in error
  assert message in error
  assert error.count("\n") == 1
  assert not (tmp_path / "out" / "result.json").exists()


def test_a_misspelt_flag_is_an_exit_status_and_one_line(tmp_path):
  args = quickstart(tmp_path, "--config.cluster.num_instnaces=2")
  done = subprocess.run(
    [sys.executable, "-m", "experiments.run", *args],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "error: There is no field config.cluster.num_instnaces; did you mean"
    " config.cluster.num_instances?\n"
  )
