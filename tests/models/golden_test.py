"""The model against what `transformers` computed; see tests/golden."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.models.hf_loader import load_hf, param_specs
from tests import testing
from tests.tolerances import tolerance

FAMILIES = (
  "llama2",
  "llama3",
  "mistral",
  "mistral_window",
  "qwen2",
  "qwen2_window",
  "qwen3",
)
PADDED_TOKENS = 220


@functools.cache
def _expected(family):
  with np.load(testing.GOLDEN / family / "expected.npz") as arrays:
    return [
      {
        name: arrays[f"{name}_{i}"]
        for name in ("prompt", "positions", "logits", "greedy")
      }
      for i in range(len(arrays.files) // 4)
    ]


def _load(family, mesh=None):
  mesh = make_mesh(1, 1) if mesh is None else mesh
  return load_hf(testing.GOLDEN / family, mesh, dtype="float32")


def _teacher_forced(case):
  """Prompt and greedy tokens, padded so that all cases compile once.

  Greedy decoding gives these tokens exactly if each is the best one after all
  before it; causality keeps the padding behind the end invisible.
  """
  tokens = np.zeros(PADDED_TOKENS, np.int32)
  text = np.concatenate([case["prompt"], case["greedy"]])
  tokens[: len(text)] = text
  return tokens


def _greedy(case, logits):
  rows = len(case["prompt"]) - 1 + np.arange(len(case["greedy"]))
  return np.argmax(logits[rows], axis=-1)


def _run(model, kv_dtype=None):
  return jax.jit(
    lambda tokens: testing.dense_logits(model, tokens, kv_dtype=kv_dtype)
  )


def _errors(run, family):
  """Differences of all recorded logits, `[rows, V]`."""
  return np.concatenate(
    [
      run(_teacher_forced(case))[case["positions"]] - case["logits"]
      for case in _expected(family)
    ]
  )


def _assert_agrees(run, family):
  for case in _expected(family):
    logits = np.asarray(run(_teacher_forced(case)))
    error = np.abs(logits[case["positions"]] - case["logits"])
    assert error.max() < tolerance("float32").logits
    np.testing.assert_array_equal(_greedy(case, logits), case["greedy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family):
  _assert_agrees(_run(_load(family).dense()), family)


def test_greedy_decoding_step_by_step_gives_the_same_tokens():
  model = _load("llama3").dense()
  case = _expected("llama3")[0]

  tokens = testing.dense_greedy(model, case["prompt"], len(case["greedy"]))

  assert tokens == case["greedy"].tolist()


def _sharded(loaded, mesh):
  """Runs the model under `shard_map`, a copy on each instance."""

  def run(state, tokens):
    return testing.dense_logits(nnx.merge(loaded.graphdef, state), tokens)

  program = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(param_specs(loaded.config, mesh), PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  )
  return functools.partial(program, loaded.state)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensor_ranks_agree_with_transformers(family):
  mesh = make_mesh(1, 2)

  _assert_agrees(_sharded(_load(family, mesh), mesh), family)


def test_instances_hold_replicas_of_each_tensor_shard():
  mesh = make_mesh(2, 2)

  _assert_agrees(_sharded(_load("qwen3", mesh), mesh), "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
  ("dtype", "kv_dtype"), [("bfloat16", None), ("float32", "bfloat16")]
)
def test_logits_of_less_precision_stay_close(family, dtype, kv_dtype):
  loaded = load_hf(testing.GOLDEN / family, make_mesh(1, 1), dtype=dtype)
  leaves = jax.tree.leaves(loaded.state)
  assert {leaf.dtype.name for leaf in leaves} == {dtype}

  errors = _errors(_run(loaded.dense(), kv_dtype), family)

  allowed = tolerance(dtype, kv_dtype)
  assert np.abs(errors).max() < allowed.logits
  assert np.sqrt(np.mean(errors**2)) < allowed.logits_rms


@pytest.mark.parametrize(
  ("family", "change"),
  [
    ("llama3", lambda c: {"rope": dataclasses.replace(c.rope, scaling="none")}),
    ("mistral_window", lambda c: {"sliding_window": None}),
    ("mistral_window", lambda c: {"sliding_window": c.sliding_window + 1}),
    ("qwen2_window", lambda c: {"windowed_layers": None}),
  ],
)
def test_the_golden_values_depend_on_the_feature(family, change):
  model = _load(family).dense()
  model.config = dataclasses.replace(model.config, **change(model.config))

  error = np.abs(_errors(_run(model), family)).max()
  assert error > 100 * tolerance("float32").logits
